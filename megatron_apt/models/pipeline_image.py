"""Image encoders of whole diffusers pipelines: what WanImageToVideoPipeline.encode_image gives for a first frame, from the pipeline's folder.

As for text (pipeline_text.py): safetensors only, nothing is downloaded, and pictures are prepared by the class that model_index.json names.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from megatron_apt.models.codec import checked_model_folder, load_frozen
from megatron_apt.models.pipeline_text import part_class, read_index


def has_image_encoder(path: str | Path) -> bool:
    """Whether this is a pipeline's folder whose model_index.json names an image encoder."""
    folder = Path(path)
    return (folder / "model_index.json").is_file() and part_class(read_index(folder), "image_encoder") != ""


class ClipImageEncoder:
    """The CLIP vision model of a Wan2.1 I2V pipeline: the layer before the last, class token and patches.

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
            raise ValueError(f"{folder}/model_index.json: names no image_encoder; give the pipeline of a Wan2.1 I2V model, or none for Wan2.2's")
        processor_class = getattr(transformers, part_class(index, "image_processor"), None)
        if processor_class is None or not hasattr(processor_class, "preprocess"):
            raise ValueError(f"model_index.json: image_processor is {index.get('image_processor')}; it must name an image processor of transformers")
        file = folder / "image_processor" / "preprocessor_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; copy the pipeline's image_processor there")
        self._processor = processor_class.from_pretrained(file.parent, local_files_only=True)
        weights = checked_model_folder(folder / "image_encoder", "clip_vision_model")
        self._model = load_frozen(transformers.CLIPVisionModel, weights, device, dtype=torch.float32)
        config = self._model.config
        self.shape = (1 + (config.image_size // config.patch_size) ** 2, config.hidden_size)

    def config_dict(self) -> dict:
        return {"kind": "clip", "path": self.path}

    @torch.no_grad()
    def encode(self, frame: Tensor) -> Tensor:
        """(3, 1, H, W) in [-1, 1] to (L, E), float32 on the CPU. The processor resizes 8-bit pictures, so the frame becomes one again."""
        values = (127.5 * frame[:, 0] + 127.5).round().clamp(0, 255).to(torch.uint8)
        picture = Image.fromarray(values.permute(1, 2, 0).cpu().numpy())
        pixels = self._processor(images=picture, return_tensors="pt").pixel_values
        return self._model(pixels.to(self._model.device), output_hidden_states=True).hidden_states[-2][0].float().cpu()


def load_image_encoder(config: dict, device: str = "cpu") -> ClipImageEncoder:
    """The encoder whose config_dict() this is.

    Raises:
        ValueError: unknown kind.
    """
    if config.get("kind") != "clip":
        raise ValueError(f"image encoder kind={config.get('kind')!r} is unknown; use 'clip'")
    return ClipImageEncoder(config["path"], device)
