"""The model card of an exported generator: what it is, what made it, how to run it."""

import json
from pathlib import Path

from megatron_apt import schema
from megatron_apt.checkpoint.state import from_dict, model_of
from megatron_apt.checkpoint.store import CheckpointError
from megatron_apt.convert.counterpart import Counterpart
from megatron_apt.data.identity import Identity, Shape, shape_of
from megatron_apt.data.index import read_info
from megatron_apt.methods.config import MethodConfig
from megatron_apt.methods.registry import METHODS, PRETRAINING
from megatron_apt.models.config import ModelConfig


def model_card(
    state: dict, family: Counterpart, average: bool, license: str, base: str, experts: str = ""
) -> str:
    """Markdown with Hugging Face's front matter.

    Args:
        state: state.json of the checkpoint.
        average: the weights are the average over training (EMA).
        base: pipeline whose other parts were copied, or "".
        experts: what there is to say of a pipeline of two networks.
    """
    config, trained = state["config"], state["iteration"] > 0
    method = from_dict(METHODS[config["method"]], config[config["method"]])
    one_step = trained and method.one_step
    model = model_of(config["model"])
    task = "text-to-image" if model.pictures else "text-to-video"
    task = "image-to-video" if model.image_to_video else task
    tags = method.tags if trained else METHODS[PRETRAINING].tags
    lines = ["---", f"license: {json.dumps(license)}", "library_name: diffusers", f"pipeline_tag: {task}"]
    lines += [f"tags: [{', '.join(tags)}]", "---", ""]
    lines += [f"# {'One-step generator' if one_step else 'Flow-matching model'} ({family.architecture})", ""]
    lines += _usage(state, model, task, base) if one_step else []
    lines += ["## Recipe", ""]
    lines += _training(state, method, average) if trained else []
    # Names alone: where the folders lay is nobody's business.
    sources = ((role, source) for role, source in state["sources"].items() if source)
    lines += [f"- {role} started from `{_name(source)}`" for role, source in sources]
    lines += [f"- other parts of the pipeline copied from `{_name(base)}`"] if base else []
    lines += [f"- {experts}"] if experts else []
    lines += ["", "## Data", "", *(_datasets(state) if trained else ["Not trained further."])]
    if state.get("values"):
        values = json.dumps(state["values"], indent=1)
        lines += ["", "## Metrics at the last checkpoint", "", "```json", values, "```"]
    return "\n".join(lines) + "\n"


def _usage(state: dict, model: ModelConfig, task: str, base: str) -> list[str]:
    """How a sample is made in one step."""
    step = "Makes a sample in one evaluation, without guidance: "
    if not base:
        return [f"{step}one Euler step from noise to data, x = z - v(z, 1).", ""]
    # What a model is told of guidance is an input of the network, no second evaluation.
    guidance = f"guidance_scale={model.guidance or 1:g}"
    return [
        f"{step}the scheduler beside it takes one Euler step from noise to data, x = z - v(z, 1).",
        "",
        "```python",
        "pipeline = DiffusionPipeline.from_pretrained(FOLDER)",
        f"pipeline({'image, ' if model.image_to_video else ''}prompt, num_inference_steps=1, {guidance}"
        f"{_shape_arguments(state, task)})",
        "```",
        "",
    ]


def _training(state: dict, method: MethodConfig, average: bool) -> list[str]:
    config, optimizer = state["config"], state["config"]["optimizer"]
    averaged = f", weights averaged with decay {optimizer['ema']}" if average else ""
    return [
        f"- method `{config['method']}`, {state['iteration']} iterations of {config['global_batch']} "
        f"samples, seed {config['seed']}",
        f"- {optimizer['kind']}, learning rate {optimizer['lr']}{averaged}",
        *(f"- {line}" for line in method.card_lines()),
    ]


def _datasets(state: dict) -> list[str]:
    """A line for each dataset with what its samples were, and one for the prompts."""
    data = state["config"]["data"]
    lines = [
        f"- `{_name(folder)}`{f': {_shape_in_words(shape)}' if shape else ''}"
        for folder, shape in zip(data["shards"], _trained_shapes(state), strict=True)
    ]
    length = data["text_length"]
    prompts = f"padded or cut to {length} tokens" if length else "of their own length, without padding"
    return [*lines, f"- prompts {prompts}"]


def _shape_arguments(state: dict, task: str) -> str:
    """Of the pipeline's call, those that ask for samples as the generator was trained on, of the first
    dataset; empty where nothing says what they were.
    """
    shape = next(iter(_trained_shapes(state)), None)
    if shape is None:
        return ""
    frames = f", num_frames={shape.frames}" if task.endswith("video") else ""
    return f"{frames}, height={shape.height}, width={shape.width}"


def _shape_in_words(shape: Shape) -> str:
    size = f"{shape.height} pixels high, {shape.width} wide"
    if shape.frames == 1:
        return f"pictures, {size}"
    if shape.fps:
        return f"clips of {shape.frames} frames at {shape.fps:g} a second, {size}"
    taken = "all" if shape.stride == 1 else f"one in {shape.stride}"
    return f"clips of {shape.frames} frames ({taken} of their sources' frames), {size}"


def _trained_shapes(state: dict) -> list[Shape | None]:
    """Of each dataset in order: as the checkpoint has it, or, where that is older than this
    record, as the dataset itself says if it is still where it was.

    Raises:
        CheckpointError: the checkpoint's record is damaged.
    """
    known = schema.convert(
        state.get("data", []),
        list[Identity],
        "state.json: data",
        remedy="use an older checkpoint",
        error=CheckpointError,
    )
    folders = state["config"]["data"]["shards"]
    shapes = [dataset.shape for dataset in known] + [None] * len(folders)
    return [shape or _found_shape(Path(folder)) for shape, folder in zip(shapes, folders, strict=False)]


def _found_shape(folder: Path) -> Shape | None:
    try:
        return shape_of(read_info(folder), folder)
    except (OSError, ValueError):
        return None  # gone, or another's: the card is then shorter


def _name(path: str) -> str:
    """The last parts of a path that tell what it is: run and iteration, pipeline, or
    OWNER/NAME in a hub's cache (models--OWNER--NAME).
    """
    if cached := [part for part in Path(path).resolve().parts if part.startswith("models--")]:
        return cached[-1].removeprefix("models--").replace("--", "/", 1)
    parts = [part for part in Path(path).absolute().parts if part not in ("checkpoints", "transformer")]
    return "/".join(parts[-2:] if parts and parts[-1].startswith("iteration-") else parts[-1:])
