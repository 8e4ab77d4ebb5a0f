"""What a block costs on a chip, as `tools/benchmarks/gpu.sh` measured it."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_apt.models.config import ModelConfig
from megatron_apt.pipeline.graph import Cost


@dataclass(frozen=True)
class Calibration:
    """Seconds of one block for one sample.

    Attributes:
        seconds: of its forward pass, input gradients and weight gradients.
        flops: of its forward pass.
        what: device and number format.
    """

    seconds: Cost
    flops: float
    visual_tokens: int
    text_tokens: int
    what: str

    @property
    def relative(self) -> Cost:
        """The same with the forward pass as the unit."""
        return Cost(1.0, self.seconds.I / self.seconds.F, self.seconds.W / self.seconds.F)

    def block(self, model: ModelConfig) -> Cost:
        """Seconds of a block of another model on samples of the same length, by its arithmetic."""
        cost = self.seconds * (block_flops(model, self.visual_tokens, self.text_tokens) / self.flops)
        again = cost.F if model.recompute == "full" else 0.0  # the backward pass begins with another forward pass
        return Cost(cost.F, cost.I + again, cost.W)


def block_flops(model: ModelConfig, visual: int, text: int) -> float:
    """Of one block's forward pass over one sample: 2 for each weight and token, and 4 D of attention for each query and key.

    In Wan the visual tokens attend to each other and then to the text, which is only projected to keys and values; elsewhere all attend to all.
    """
    d, mlp = model.width, 2 * model.mlp
    if model.family == "wan":
        return 2 * d * (visual * (6 * d + mlp) + text * 2 * d) + 4 * d * visual * (visual + text)
    tokens = visual + text
    return 2 * d * tokens * (4 * d + mlp) + 4 * d * tokens**2


def read(source: str) -> Calibration:
    """From `FILE` or `FILE:FORMAT` (bf16 if it is left out, or for example `FILE:fp8 current`).

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    path, colon, name = (source, "", "") if Path(source).exists() else source.rpartition(":")
    path, name = (path, name) if colon else (source, "bf16")
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        if name not in stored["blocks"]:
            raise ValueError(f"has no {name!r}; it has {', '.join(map(repr, stored['blocks'])) or 'nothing: every measurement failed'}")
        times = [float(stored["blocks"][name][kind]) for kind in "FIW"]
        tokens = stored["visual_tokens"], stored["text_tokens"]
        flops = block_flops(ModelConfig(width=stored["width"], heads=1, mlp_ratio=stored["mlp_ratio"]), *tokens)
        if min(*times, flops) <= 0:
            raise ValueError(f"{name!r} holds times {times}; all must be above 0")
    except OSError as error:
        raise ValueError(f"calibration {source!r}: cannot be read ({error}); `bash tools/benchmarks/gpu.sh` writes one on a GPU") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"calibration {source!r}: no such file as tools/benchmarks/gpu.sh writes ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise ValueError(f"calibration {source!r}: {error}") from None
    return Calibration(Cost(*times), flops, *tokens, f"{stored['device']}, {name}")
