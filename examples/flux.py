"""FLUX.1 dev (12B) into a one-step generator of pictures, on 64 GPUs.

Not run at this size; tests build the recipes and run a tiny Flux.

    megatron-apt convert import FLUX.1-dev runs/flux/pretrained
    megatron-apt encode --source pictures/ --output data/images \\
        --height 1024 --width 1024 \\
        --codec kl --codec-path FLUX.1-dev/vae --text FLUX.1-dev
    srun megatron-apt train examples/flux.py:consistency
    srun megatron-apt train examples/flux.py:apt
    megatron-apt convert export runs/flux/apt flux-one-step --base FLUX.1-dev

The published weights hold guidance already: they are told its scale (model.guidance,
3.5 as in the pipeline), in every stage the same, and the exported pipeline is called with
it as its guidance_scale. Losses, learning rates, sigma, s, averages and numbers of
updates are the APT paper's for images; batches are smaller (see examples/wan.py).
"""

from megatron_apt.config import DataConfig, InitConfig, ParallelConfig, RunConfig
from megatron_apt.families.flux.config import flux_dev
from megatron_apt.methods.recipes import after, distilled, paper_images


def consistency() -> RunConfig:
    """Stage 1: nothing to fold in (guidance 1); shift 3, near that of the pipeline at 1024 x 1024."""
    base = RunConfig(
        output="runs/flux/consistency",
        global_batch=256,
        micro_batch=4,
        model=flux_dev(),
        parallel=ParallelConfig(tp=2, pp=2, sequence_parallel=True),
        # Of the T5, which pads to this; the model reads the padding
        data=DataConfig(shards=("data/images",), text_length=512),
        init=InitConfig(diffusion="runs/flux/pretrained"),
    )
    return distilled(base, shift=3.0, guidance_scale=1.0)


def apt() -> RunConfig:
    """Stage 2."""
    first = consistency()
    return paper_images(first, output="runs/flux/apt", global_batch=1024, init=after(first))
