"""A pretrained Wan into a one-step generator: 1.3B and 5B on 32 GPUs, 14B on 256.

Not run at this size; tests build the recipes and run a tiny Wan.

    megatron-apt convert import Wan2.1-T2V-1.3B-Diffusers runs/wan/pretrained
    megatron-apt encode --source clips/ --output data/videos \\
        --frames 49 --height 480 --width 832 --fps 16 \\
        --codec wan --codec-path Wan2.1-T2V-1.3B-Diffusers/vae \\
        --text Wan2.1-T2V-1.3B-Diffusers
    srun megatron-apt train examples/wan.py:consistency
    srun megatron-apt train examples/wan.py:image
    srun megatron-apt train examples/wan.py:video
    megatron-apt convert export runs/wan/video wan-one-step --base Wan2.1-T2V-1.3B-Diffusers

Image to video with Wan2.1's 14B (one consistency and one APT stage, both on clips; a
sample continues a given first frame):

    megatron-apt convert import Wan2.1-I2V-14B-480P-Diffusers runs/wan/pretrained-i2v
    megatron-apt encode --source clips/ --output data/videos-i2v \\
        --frames 49 --height 480 --width 832 --fps 16 --image-to-video \\
        --codec wan --codec-path Wan2.1-I2V-14B-480P-Diffusers/vae \\
        --text Wan2.1-I2V-14B-480P-Diffusers
    srun megatron-apt train examples/wan.py:consistency_i2v_14b
    srun megatron-apt train examples/wan.py:video_i2v_14b
    megatron-apt sample runs/wan/video-i2v-14b --image first.png \\
        --prompts "the boat leaves the harbour" --format mp4 --fps 16
    megatron-apt convert export runs/wan/video-i2v-14b wan-i2v-one-step \\
        --base Wan2.1-I2V-14B-480P-Diffusers

With Wan2.2's 5B, whose weights and datasets are those of text to video (which
`--model.no-first-frame` trains instead):

    megatron-apt convert import Wan2.2-TI2V-5B-Diffusers runs/wan/pretrained-5b --first-frame
    megatron-apt encode --source clips/ --output data/videos-5b \\
        --frames 49 --height 704 --width 1280 --fps 24 \\
        --codec wan --codec-path Wan2.2-TI2V-5B-Diffusers/vae \\
        --text Wan2.2-TI2V-5B-Diffusers
    srun megatron-apt train examples/wan.py:consistency_i2v_5b
    srun megatron-apt train examples/wan.py:video_i2v_5b
    megatron-apt sample runs/wan/video-i2v-5b --image first.png \\
        --prompts "the boat leaves the harbour" --format mp4 --fps 24
    megatron-apt convert export runs/wan/video-i2v-5b wan-i2v-one-step \\
        --base Wan2.2-TI2V-5B-Diffusers

Losses, learning rates, sigma, s, averages and numbers of updates are the APT paper's.
Batches are not: it had 1,024 GPUs. RMSProp's steps hardly depend on the size of a
gradient, so smaller batches keep the learning rate and take noisier steps.
"""

from dataclasses import replace

from megatron_apt.config import DataConfig, InitConfig, ParallelConfig, RunConfig
from megatron_apt.families.wan.config import wan_1_3b, wan_5b_i2v, wan_14b, wan_14b_i2v
from megatron_apt.methods.recipes import after, distilled, paper_images, paper_videos

LENGTH = 512  # Wan reads captions padded with zeros to this, unmasked


def consistency() -> RunConfig:
    """Stage 1, on pictures and clips: guidance 5 (Wan's own for 480p) folded in; shift 5
    for its mostly video grid.
    """
    base = RunConfig(
        output="runs/wan/consistency",
        global_batch=256,
        micro_batch=1,
        model=wan_1_3b(),
        parallel=ParallelConfig(tp=2, cp=2, sequence_parallel=True),
        data=DataConfig(shards=("data/videos", "data/images"), weights=(3, 1), text_length=LENGTH),
        init=InitConfig(diffusion="runs/wan/pretrained"),
    )
    return distilled(base, shift=5.0, guidance_scale=5.0)


def image() -> RunConfig:
    """Stage 2 on pictures."""
    return _images(consistency(), "runs/wan/image")


def video() -> RunConfig:
    """Stage 2 on clips, from the pictures' average."""
    return _videos(image(), "runs/wan/video")


def consistency_14b() -> RunConfig:
    """Stage 1 of 14B: G and D of 40 blocks in a pipeline of 4 stages, 8 GPUs a stage."""
    return replace(
        consistency(),
        output="runs/wan/consistency-14b",
        model=wan_14b(),
        parallel=ParallelConfig(tp=4, cp=2, pp=4, sequence_parallel=True),
    )


def image_14b() -> RunConfig:
    """Stage 2 of 14B on pictures."""
    return _images(consistency_14b(), "runs/wan/image-14b")


def video_14b() -> RunConfig:
    """Stage 2 of 14B on clips."""
    return _videos(image_14b(), "runs/wan/video-14b")


def consistency_i2v_14b() -> RunConfig:
    """Stage 1 on clips alone: a picture that is its own first frame leaves nothing to generate."""
    return replace(
        consistency_14b(),
        output="runs/wan/consistency-i2v-14b",
        model=wan_14b_i2v(),
        data=_only("data/videos-i2v"),
        init=InitConfig(diffusion="runs/wan/pretrained-i2v"),
    )


def video_i2v_14b() -> RunConfig:
    """Stage 2, from the distilled model."""
    return _videos(consistency_i2v_14b(), "runs/wan/video-i2v-14b", "data/videos-i2v")


def consistency_i2v_5b() -> RunConfig:
    """Stage 1 of Wan2.2's 5B on clips; one of 49 frames at 704 x 1280 is 11,440 tokens."""
    return replace(
        consistency(),
        output="runs/wan/consistency-i2v-5b",
        model=wan_5b_i2v(),
        data=_only("data/videos-5b"),
        init=InitConfig(diffusion="runs/wan/pretrained-5b"),
    )


def video_i2v_5b() -> RunConfig:
    """Stage 2, from the distilled model."""
    return _videos(consistency_i2v_5b(), "runs/wan/video-i2v-5b", "data/videos-5b")


def _only(folder: str) -> DataConfig:
    return DataConfig(shards=(folder,), text_length=LENGTH)


def _images(previous: RunConfig, output: str) -> RunConfig:
    data = _only("data/images")
    return paper_images(previous, output=output, global_batch=1024, data=data, init=after(previous))


def _videos(previous: RunConfig, output: str, clips: str = "data/videos") -> RunConfig:
    data = _only(clips)
    return paper_videos(previous, output=output, global_batch=512, data=data, init=after(previous))
