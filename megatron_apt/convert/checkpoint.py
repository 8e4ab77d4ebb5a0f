"""A checkpoint of ours that is exported or compared: what its state.json says, by
declared types, and what it goes back to.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from megatron_apt import schema
from megatron_apt.checkpoint import store
from megatron_apt.checkpoint.state import model_of
from megatron_apt.convert.source import part_of
from megatron_apt.methods.config import MethodConfig
from megatron_apt.methods.registry import METHODS
from megatron_apt.models.config import ModelConfig


class _Optimizer(msgspec.Struct):
    kind: str
    lr: float
    ema: float


class _Data(msgspec.Struct):
    shards: list[str]


class _Config(msgspec.Struct):
    """What an export and its model card tell of a run."""

    method: str
    global_batch: schema.Positive
    seed: int
    optimizer: _Optimizer
    data: _Data
    model: Any = None  # checked by ModelConfig


class _State(msgspec.Struct):
    iteration: schema.Count
    config: _Config
    ema: bool
    sources: dict[str, str]
    values: dict[str, Any]
    imported: dict[str, Any] | None = None
    part: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of ours, of which one set of weights is exported.

    Attributes:
        prefix: of the weights' names in it; what is never trained has the role's in any case.
    """

    folder: Path
    state: dict
    model: ModelConfig
    prefix: str

    @staticmethod
    def open(path: str, weights: str = "auto") -> "Checkpoint":
        """`weights`: ema, raw, or auto (ema where there is one).

        Raises:
            CheckpointError: nothing there, or no such weights.
        """
        folder = store.resolve(path)
        state = _read_state(folder)
        if weights == "ema" and not state["ema"]:
            raise store.CheckpointError(f"{folder}: keeps no average (optimizer.ema=0); use --weights raw")
        average = state["ema"] and weights != "raw"
        try:
            model = model_of(state["config"]["model"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise store.CheckpointError(
                f"{folder}/state.json: describes no model ({type(error).__name__}: {error}); use an older "
                "checkpoint"
            ) from None
        role = _method(state).sampled
        return Checkpoint(folder, state, model, f"{role}.ema." if average else f"{role}.")

    @property
    def one_step(self) -> bool:
        """It was trained to make a sample in one evaluation."""
        return self.state["iteration"] > 0 and self.method.one_step

    @property
    def method(self) -> type[MethodConfig]:
        """What it was trained by."""
        return _method(self.state)

    @property
    def source(self) -> str:
        """What its weights started from; empty: random ones."""
        return _source(self.state)

    def original(self) -> dict | None:
        """config.json of the Hugging Face checkpoint it goes back to, where that can still be found."""
        state = self._imported()
        return None if state is None else state["imported"]

    @property
    def part(self) -> str | None:
        """What of a pipeline it was imported as: transformer, or transformer_2; None
        where that cannot be found any more.
        """
        if (state := self._imported()) is None:
            return None
        # The first imports did not say it
        return part_of(state.get("part") or Path(_source(state)).name)

    def _imported(self) -> dict | None:
        """state.json of the import it goes back to, where that can still be found."""
        state = self.state
        for _ in range(8):  # an import and the stages that began from it
            if state.get("imported") is not None:
                return state
            source = _source(state).removesuffix(":ema").removesuffix(":raw")
            if not source:
                return None
            try:
                state = _read_state(store.resolve(source))
            except store.CheckpointError:
                return None
        return None


def _method(state: dict) -> type[MethodConfig]:
    return METHODS[state["config"]["method"]]


def _source(state: dict) -> str:
    return state["sources"].get(_method(state).sampled, "")


def _read_state(folder: Path) -> dict:
    """state.json, whose types are as declared above.

    Raises:
        CheckpointError: naming the field.
    """
    state = store.read_state(folder)
    remedy = "the checkpoint is damaged: use an older one"
    schema.convert(state, _State, f"{folder}/state.json", remedy=remedy, error=store.CheckpointError)
    return dict(state)
