"""Shape of an MMDiT whose later layers have one set of weights for text and visual tokens."""

from dataclasses import dataclass

from megatron_apt.models.checks import DEEPEST, WIDEST, check_number, check_tuples, check_whole
from megatron_apt.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class SingleStreamConfig(ModelConfig):
    """Double blocks, then single ones."""

    double_blocks: int = 0
    """Blocks with separate weights for text and visual tokens; in those after them both share one set."""
    pooled_width: int = 768
    """Width of the pooled text, which CLIP gives for the whole caption."""
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    """Numbers of a head that frame, row and column turn."""
    guidance: float = 0.0  # ty: ignore[incompatible-attribute-override]
    """The scale of guidance that the model is told, which its pipeline calls
    guidance_scale; 0: a model without that input.
    """

    def _check_fields(self) -> None:
        super()._check_fields()
        check_whole(self, "model.", 0, DEEPEST, "double_blocks")
        check_whole(self, "model.", 1, WIDEST, "pooled_width")
        check_number(self.guidance, "model.guidance", 0)
        check_tuples(self, "model.", rope_axes=3)
        if any(axis < 2 or axis % 2 for axis in self.rope_axes):
            raise ValueError(
                f"model.rope_axes={self.rope_axes}: each must be even and at least 2, because pairs of "
                "numbers turn"
            )

    def _check_family(self) -> None:
        if self.patch[1] != self.patch[2]:
            raise ValueError(
                f"model.patch={self.patch}: model.family={self.family!r} has as many rows as columns in a "
                "patch"
            )
        if self.double_blocks > self.depth:
            raise ValueError(
                f"model.double_blocks={self.double_blocks}: there are {self.depth} blocks in "
                "all (model.depth)"
            )
        if sum(self.rope_axes) != self.head_size:
            raise ValueError(
                f"model.rope_axes={self.rope_axes}: must add up to the {self.head_size} numbers of a head"
            )
        if self.mlp % self.heads:
            raise ValueError(
                f"model.mlp_width={self.mlp}: model.family={self.family!r} deals it out to "
                f"model.heads={self.heads}; use a multiple"
            )

    @property
    def rotary_pairs(self) -> tuple[int, int, int]:
        frames, rows, columns = self.rope_axes
        return frames // 2, rows // 2, columns // 2
