"""Configuration: small frozen dataclasses, each of which checks itself. A run is a
function that returns a RunConfig (see examples/).
"""

import warnings
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from megatron_apt.errors import require
from megatron_apt.families import registry
from megatron_apt.methods.registry import MethodConfigs
from megatron_apt.models.config import ModelConfig
from megatron_apt.moved import names_of

__getattr__ = names_of(__name__)
_MOST_MINUTES = 366 * 24 * 60


@dataclass(frozen=True)
class ParallelConfig:
    """The mesh. Data parallelism takes the processes that tp x cp x pp leaves."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    sequence_parallel: bool = True
    """With tp > 1: split activations between blocks over the tensor-parallel ranks."""
    context_parallel: Literal["ulysses", "all_gather", "p2p", "a2a+p2p"] = "ulysses"
    """How joint attention spans the cp ranks. ulysses (all-to-all over heads) and
    all_gather (of keys and values) run everywhere and take packed samples; p2p (a ring)
    and a2a+p2p are Transformer Engine's on CUDA, for microbatches of equal samples.
    """
    context_parallel_inner: int = 0
    """With a2a+p2p: how many neighbouring ranks trade heads; groups of that many form the ring."""
    row_multiple: int = 1
    """Pads the tokens of each rank's part of a microbatch to a multiple of this, which
    FP8 products need (16; mxfp8 32).
    """
    timeout_minutes: float = 10.0
    """How long a collective may take before it fails. Ranks that die are found sooner
    (guards.rank_timeout).
    """

    def __post_init__(self):
        for name in ("tp", "cp", "pp", "row_multiple"):
            value = getattr(self, name)
            require(value >= 1, f"parallel.{name}", value, "must be at least 1")
        minutes = self.timeout_minutes
        require(
            0 < minutes <= _MOST_MINUTES,
            "parallel.timeout_minutes",
            minutes,
            f"must be positive, and at most {_MOST_MINUTES:,} (a year)",
        )
        inner, nested = self.context_parallel_inner, self.context_parallel == "a2a+p2p"
        fits = 1 < inner < self.cp and self.cp % inner == 0 if nested else inner == 0
        require(
            fits,
            "parallel.context_parallel_inner",
            inner,
            f"with a2a+p2p give a divisor of cp={self.cp} above 1 and below it; otherwise leave it 0",
        )


@dataclass(frozen=True)
class PipelineConfig:
    """The schedule of parallel.pp > 1. `megatron-apt schedule` shows what each choice costs."""

    schedule: Literal["interleaved", "zero_bubble", "1f1b", "gpipe"] = "interleaved"
    """interleaved fills one network's bubbles with the other's work; the others run the
    phases one after the other, with G and D as two virtual stages of each rank in the G
    phase. gpipe runs all forwards first and takes the memory for it.
    """
    window: int = 4
    """Iterations scheduled as one, the next one's generator beside this one's
    discriminator. The pipeline drains at a window's end, and windows end where a
    checkpoint falls.
    """
    chunks: Literal[0, 1, 2] = 0
    """Stages of each network on a rank; 2: there and back, a V; 0: a V where the networks are deep enough."""
    cap: float = 0.0
    """Most live activations on a rank, in microbatches of its part of one network; 0:
    twice the ranks, which 1F1B phase by phase needs for APT, and more where a method
    stacks more than two versions of a sample. gpipe takes what it needs.
    """
    forward: float = 1.0
    """Time of a rank's part of the deepest network, in any unit, for the schedule to be
    planned with; likewise the next three.
    """
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    message: float = 0.0
    calibration: str = ""
    """A file of tools/benchmarks/gpu.sh, or FILE:FORMAT, whose measured times of a block
    take the place of the first three.
    """
    evaluations: int = 0
    """Schedules tried in the search at start-up; 0 only improves what long searches found
    for APT, and for other methods plain order.
    """

    def __post_init__(self):
        require(self.window >= 1, "pipeline.window", self.window, "must be at least 1")
        for name in ("forward", "input_gradient", "weight_gradient"):
            value = getattr(self, name)
            require(value > 0, f"pipeline.{name}", value, "must be positive")
        for name in ("cap", "message", "evaluations"):
            value = getattr(self, name)
            require(value >= 0, f"pipeline.{name}", value, "must not be negative")


@dataclass(frozen=True)
class DataConfig:
    shards: tuple[str, ...] = ()
    """Folders written by `megatron-apt encode`; several are mixed, e.g. images and videos."""
    weights: tuple[int, ...] = ()
    """How many blocks of each folder stand in one turn of the mixture; empty: one of each."""
    block: int = 32
    """Samples that follow each other from one folder. A microbatch cut from one block is
    of one kind, which is fastest; other cuts are packed.
    """
    text_length: int | None = None
    """Pad or cut captions to this many tokens; 0 keeps each caption's own length; None pads
    as the pipelines of the model's family do.
    """

    def __post_init__(self):
        weights = self.weights or (1,) * len(self.shards)
        require(
            len(weights) == len(self.shards),
            "data.weights",
            self.weights,
            f"give one weight for each of the {len(self.shards)} folders",
        )
        require(
            self.text_length is None or self.text_length >= 0,
            "data.text_length",
            self.text_length,
            "must not be negative; 0 keeps each caption's length",
        )
        require(self.block >= 1, "data.block", self.block, "must be at least 1")
        require(
            all(w >= 1 for w in weights),
            "data.weights",
            self.weights,
            "weights are whole numbers of at least 1",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    kind: Literal["adamw", "rmsprop"] = "rmsprop"
    lr: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW only."""
    alpha: float = 0.9
    """RMSProp only: decay of its single state, the mean square gradient."""
    eps: float = 1e-8
    weight_decay: float = 0.0
    """AdamW only; acts on matrices, not on biases, norms or tables."""
    warmup: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    ema: float = 0.995
    """Decay of the fp32 moving average of the generator; 0 turns it off."""
    overlap: bool = True
    """Reduce-scatters each bucket of gradients while the last microbatch's backward still
    runs; in a pipeline all of a network's buckets once its last weight gradient on the
    rank is there, while other actions run.
    """
    bucket_size: int | None = None
    """Weights of one bucket; None: 40 million, or a million for each data-parallel rank if that is more."""

    def __post_init__(self):
        require(
            self.bucket_size is None or self.bucket_size > 0,
            "optimizer.bucket_size",
            self.bucket_size,
            "must be positive",
        )
        require(self.lr > 0, "optimizer.lr", self.lr, "must be positive")
        for name in ("ema", "alpha"):
            require(
                0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1)"
            )
        require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "must be in [0, 1)")
        for name in ("eps", "weight_decay", "warmup"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name}", value, "must not be negative")


@dataclass(frozen=True)
class InitConfig:
    """Checkpoints that a run starts from (folders written by training; `path:ema` or
    `path:raw` picks the weights, EMA first).
    """

    generator: str = ""
    diffusion: str = ""
    """Teacher of the consistency stage, and backbone of the discriminator. Empty: weights
    drawn from the seed, for tests and benchmarks.
    """


@dataclass(frozen=True)
class GuardConfig:
    """When to stop by itself, with the last good checkpoint kept."""

    collapse_window: int = 50
    """Iterations in a row that a sign of collapse must last; 0 turns the alarm off."""
    collapse_d_loss: float = 0.02
    """Discriminator loss below which it has won for good."""
    collapse_diversity: float = 0.05
    """Mean distance between generated samples, as a share of that between real ones,
    below which they are one sample.
    """
    rank_timeout: float = 60.0
    """Seconds without a sign of life after which a rank counts as lost and the others
    stop; 0 turns the watch off.
    """
    requeue_code: int = 99
    """Exit code of a run that SIGUSR1 or SIGTERM ended before its last iteration, by
    which a batch script knows to requeue.
    """

    def __post_init__(self):
        for name in ("collapse_window", "collapse_d_loss", "collapse_diversity", "rank_timeout"):
            value = getattr(self, name)
            require(value >= 0, f"guards.{name}", value, "must not be negative")
        require(
            0 < self.requeue_code < 256,
            "guards.requeue_code",
            self.requeue_code,
            "exit codes lie in 1 .. 255; 0 says that a run is done",
        )


@dataclass(frozen=True)
class RetentionConfig:
    """Which checkpoints stay. One that any rule keeps stays."""

    last: int = 2
    """The newest so many; 0 keeps all."""
    every: int = 0
    """Those whose iteration is a multiple of this; 0: none for this reason."""
    best: str = ""
    """A logged value, e.g. g/loss: the checkpoint stays whose mean of it since the one
    before is best, and the file `best` names it.
    """
    best_is: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self):
        for name in ("last", "every"):
            value = getattr(self, name)
            require(value >= 0, f"retention.{name}", value, "must not be negative")


@dataclass(frozen=True)
class RunConfig(MethodConfigs):
    """All settings of a run."""

    output: str = "runs/run"
    seed: int = 0
    iterations: int = 100
    global_batch: int = 64
    micro_batch: int = 64
    """Samples of one microbatch on one data-parallel rank; gradient accumulation makes up
    the global batch. What is left of it after the last full round of microbatches is
    dealt out evenly, in smaller ones.
    """
    model: ModelConfig = field(default_factory=ModelConfig)
    """Left out: the model of init.diffusion or init.generator, and without those a small one."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init: InitConfig = field(default_factory=InitConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    log_every: int = 10
    save_every: int = 0
    """0 saves at the end only."""
    save_async: bool = True
    """Writes checkpoints while training goes on."""
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    tensorboard: bool = True
    kernels: Literal["auto", "kernels", "reference"] = "auto"
    """auto: own Triton kernels on CUDA, torch on a CPU; reference: torch everywhere, to compare with."""
    wandb: str = ""
    """Weights & Biases project; needs the wandb package. Empty: not used."""
    fresh: bool = False
    """Begins at iteration 0 in an output folder that holds a run's log but none of its
    checkpoints; the log is kept beside. Where there is a checkpoint, the run goes on from
    it as always.
    """

    def __post_init__(self):
        for name in ("iterations", "save_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("global_batch", "micro_batch", "log_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        require(
            (not self.output or bool(self.output.strip())) and "\0" not in self.output,
            "output",
            self.output,
            "give the name of a folder",
        )
        _check_numbers(self)


def _check_numbers(config: Any, prefix: str = "") -> None:
    """No field of a configuration, or of one inside it, is infinite, not a number, or
    larger than any count there is.
    """
    for one in fields(config):
        value, name = getattr(config, one.name), prefix + one.name
        if is_dataclass(value):
            _check_numbers(value, f"{name}.")
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                require(abs(number) < 2**63, name, value, "must be a finite number below 2^63")


def check_heads(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ValueError where heads or MLPs do not split over the ranks that share them."""
    if model.heads % parallel.tp:
        raise ValueError(
            f"model.heads={model.heads} do not split over parallel.tp={parallel.tp}; use a tp that divides "
            "the heads"
        )
    if model.mlp % parallel.tp:
        raise ValueError(
            f"MLPs are {model.mlp} wide, which does not split over parallel.tp={parallel.tp}; use a tp that "
            "divides model.mlp_width"
        )
    local_heads = model.heads // parallel.tp
    exchanged = {"ulysses": parallel.cp, "a2a+p2p": parallel.context_parallel_inner}.get(
        parallel.context_parallel, 1
    )
    if local_heads % exchanged:
        raise ValueError(
            f"model.heads={model.heads} over parallel.tp={parallel.tp} leaves {local_heads} heads, which do "
            f"not split over the {exchanged} ranks that trade them "
            f"(parallel.context_parallel={parallel.context_parallel}); use --parallel.context-parallel "
            "all_gather or another cp"
        )


def check_fits(config: RunConfig) -> None:
    """The checks that concern more than one part.

    Raises:
        ValueError: naming the fields, the values and the remedy.
    """
    model, parallel = config.model, config.parallel
    check_heads(model, parallel)
    if parallel.context_parallel in ("p2p", "a2a+p2p") and parallel.cp > 1:
        _check_ring(config)
    if model.fp8.recipe != "none":
        _check_fp8(config)
    config.of_method.check(config)
    padded = model.text_padding
    if padded is not None and config.data.text_length not in (None, padded):
        habit = (
            f"pad captions to {padded} tokens, which the model reads"
            if padded
            else "hide padding from the model"
        )
        warnings.warn(
            f"data.text_length={config.data.text_length}: diffusers' pipelines of "
            f"model.family={model.family!r} {habit}; train with {padded}, or an exported generator sees "
            "other captions than it was trained on",
            stacklevel=2,
        )


def _check_fp8(config: RunConfig) -> None:
    model, recipe = config.model, f"model.fp8.recipe={config.model.fp8.recipe!r}"
    if model.dtype != "bfloat16":
        raise ValueError(
            f'{recipe} stands on bf16 weights and activations: model.dtype={model.dtype!r} must be "bfloat16"'
        )
    # Sequence parallelism gathers quantised rows, in whole blocks of scales.
    multiple = (
        128
        if model.fp8.recipe == "blockwise" and config.parallel.sequence_parallel and config.parallel.tp > 1
        else model.fp8.row_multiple
    )
    if config.parallel.row_multiple % multiple:
        raise ValueError(
            f"{recipe} needs parallel.row_multiple={config.parallel.row_multiple} to be a multiple of "
            f"{multiple}: set it to that"
        )
    for name, width in (("width", model.width), ("width / tp", model.width // config.parallel.tp)):
        if width % multiple:
            raise ValueError(
                f"{recipe} needs model.{name}={width} to be a multiple of {multiple}; use another width, or "
                "bf16"
            )
    depth = min(config.of_method.depths(model.depth))
    if model.fp8.bf16_first + model.fp8.bf16_last >= depth:
        raise ValueError(
            f"{recipe}: bf16_first={model.fp8.bf16_first} + bf16_last={model.fp8.bf16_last} leave none of "
            f"{depth} blocks; lower them"
        )


def _check_ring(config: RunConfig) -> None:
    """Transformer Engine's rings know no packed samples: every microbatch must be of the uniform form."""
    parallel, ring = config.parallel, f"parallel.context_parallel={config.parallel.context_parallel!r}"
    length = config.data.text_length or 0
    if length == 0 or length % parallel.cp:
        raise ValueError(
            f"{ring} needs captions of one length: set data.text_length={length} to a multiple of "
            f"cp={parallel.cp}, or use ulysses"
        )
    if parallel.sequence_parallel and config.micro_batch % parallel.tp:
        raise ValueError(
            f"{ring} with sequence parallelism splits whole samples over tp={parallel.tp}: "
            f"micro_batch={config.micro_batch} must be a multiple; use one, set parallel.sequence_parallel "
            "False, or use ulysses"
        )


def to_dict(config: RunConfig) -> dict:
    """Plain JSON-ready form, written beside every checkpoint and log."""
    return asdict(config) | {"model": registry.to_stored(config.model)}
