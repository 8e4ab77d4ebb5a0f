"""HunyuanVideo (13B) into a one-step generator, on 256 GPUs.

Not run at this size; tests build the recipes and run a tiny HunyuanVideo.

    megatron-apt convert import HunyuanVideo runs/hunyuan/pretrained
    megatron-apt encode --source clips/ --output data/videos \\
        --frames 49 --height 544 --width 960 --fps 24 \\
        --codec hunyuan --codec-path HunyuanVideo/vae --text HunyuanVideo
    srun megatron-apt train examples/hunyuan.py:consistency
    srun megatron-apt train examples/hunyuan.py:image
    srun megatron-apt train examples/hunyuan.py:video
    megatron-apt convert export runs/hunyuan/video hunyuan-one-step --base HunyuanVideo

The published weights hold guidance already: they are told its scale
(model.guidance, 6 as in the pipeline), in every stage the same, and the exported
pipeline is called with it as its guidance_scale. Losses, learning rates, sigma, s,
averages and numbers of updates are the APT paper's; batches are smaller (see
examples/wan.py).
"""

from megatron_apt.config import DataConfig, InitConfig, ParallelConfig, RunConfig
from megatron_apt.families.hunyuan.config import hunyuan_video
from megatron_apt.methods.recipes import after, distilled, paper_images, paper_videos


def consistency() -> RunConfig:
    """Stage 1, on pictures and clips: nothing to fold in (guidance 1); shift 7, with
    which the model is sampled.
    """
    base = RunConfig(
        output="runs/hunyuan/consistency",
        global_batch=256,
        micro_batch=1,
        model=hunyuan_video(),
        parallel=ParallelConfig(tp=4, cp=2, pp=4, sequence_parallel=True),
        data=DataConfig(shards=("data/videos", "data/images"), weights=(3, 1)),
        init=InitConfig(diffusion="runs/hunyuan/pretrained"),
    )
    return distilled(base, shift=7.0, guidance_scale=1.0)


def image() -> RunConfig:
    """Stage 2 on pictures."""
    first, data = consistency(), DataConfig(shards=("data/images",))
    return paper_images(first, output="runs/hunyuan/image", global_batch=1024, data=data, init=after(first))


def video() -> RunConfig:
    """Stage 2 on clips, from the pictures' average."""
    second, data = image(), DataConfig(shards=("data/videos",))
    return paper_videos(second, output="runs/hunyuan/video", global_batch=512, data=data, init=after(second))
