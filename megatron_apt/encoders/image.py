"""Image encoders of whole diffusers pipelines: what WanImageToVideoPipeline.encode_image
gives for a first frame, from the pipeline's folder.

As for text (pipelines.py): safetensors only, nothing is downloaded, and pictures are
prepared by the class that model_index.json names.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from megatron_apt.encoders.foreign_folder import (
    checked_model_folder,
    checked_settings,
    explained,
    load_frozen,
    read_object,
    read_pretrained,
)
from megatron_apt.encoders.pipelines import class_of_transformers, part_class, read_index

_LARGEST = 4096  # pixels of a side that an image encoder reads


def has_image_encoder(path: str | Path) -> bool:
    """Whether this is a pipeline's folder whose model_index.json names an image encoder."""
    folder = Path(path)
    return (folder / "model_index.json").is_file() and part_class(read_index(folder), "image_encoder") != ""


class ClipImageEncoder:
    """The CLIP vision model of a Wan2.1 I2V pipeline: the layer before the last, class
    token and patches.

    Attributes:
        shape: (L, E) of an encoded picture.

    Args:
        path: pipeline folder with model_index.json, image_encoder/ and image_processor/.

    Raises:
        FileNotFoundError, ValueError: naming what is missing.
    """

    def __init__(self, path: str | Path, device: str = "cpu"):
        import transformers

        self.path, folder = str(path), Path(path)
        index = read_index(folder)
        if not has_image_encoder(folder):
            raise ValueError(
                f"{folder}/model_index.json: names no image_encoder; give a pipeline that has one, or "
                "leave it out for a model that reads no image tokens"
            )
        processor_class = class_of_transformers(index, "image_processor")
        if processor_class is None or not hasattr(processor_class, "preprocess"):
            raise ValueError(
                f"model_index.json: image_processor is {index.get('image_processor')}; it must name an image "
                "processor of transformers"
            )
        file = folder / "image_processor" / "preprocessor_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; copy the pipeline's image_processor there")
        _check_sizes(file)
        self._processor = read_pretrained(processor_class, file.parent, (), (file.name,), "image processor")
        weights = checked_model_folder(folder / "image_encoder", "clip_vision_model")
        self._model = load_frozen(transformers.CLIPVisionModel, weights, device, dtype=torch.float32)
        config = self._model.config
        self._side = config.image_size
        self.shape = (1 + (config.image_size // config.patch_size) ** 2, config.hidden_size)

    def config_dict(self) -> dict:
        return {"kind": "clip", "path": self.path}

    @torch.no_grad()
    def encode(self, frame: Tensor) -> Tensor:
        """(3, 1, H, W) in [-1, 1] to (L, E), float32 on the CPU. The processor resizes
        8-bit pictures, so the frame becomes one again.
        """
        values = (127.5 * frame[:, 0] + 127.5).round().clamp(0, 255).to(torch.uint8)
        picture = Image.fromarray(values.permute(1, 2, 0).cpu().numpy())
        with explained(
            f"{self.path}/image_processor: cannot prepare a picture",
            remedy="copy the pipeline's image_processor again",
        ):
            pixels = self._processor(images=picture, return_tensors="pt").pixel_values
        if pixels.shape != (1, 3, self._side, self._side) or not torch.isfinite(pixels).all():
            raise ValueError(
                f"{self.path}/image_processor: makes pictures of {tuple(pixels.shape)}, and the image "
                f"encoder reads finite ones of 3 x {self._side} x {self._side}; both must be of one pipeline"
            )
        return (
            self._model(pixels.to(self._model.device), output_hidden_states=True)
            .hidden_states[-2][0]
            .float()
            .cpu()
        )


def _check_sizes(file: Path) -> None:
    """Raises ValueError for a size in pixels that no image encoder reads, before a
    picture is made so large.
    """
    for field, value in read_object(file).items():
        for size in value.values() if isinstance(value, dict) else [value]:
            if (
                ("size" in field or "edge" in field)
                and isinstance(size, int | float)
                and not 0 <= size <= _LARGEST
            ):
                raise ValueError(
                    f"{file}: {field}={value!r}: must be at most {_LARGEST} pixels; copy the pipeline's "
                    "image_processor again"
                )


def load_image_encoder(config: dict, device: str = "cpu") -> ClipImageEncoder:
    """The encoder whose config_dict() this is.

    Raises:
        ValueError: unknown kind.
    """
    kind, settings = checked_settings(config, "image encoder")
    if kind != "clip":
        raise ValueError(f"image encoder kind={kind!r} is unknown; use 'clip'")
    if not settings.get("path"):
        raise ValueError("image encoder clip: has no path; encode the dataset again")
    return ClipImageEncoder(settings["path"], device)
