"""Configuration: small frozen dataclasses, each of which checks itself. A run is a
function that returns a RunConfig (see examples/).
"""

import warnings
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Literal

from megatron_apt.models.config import ModelConfig


def _check(condition: bool, field_name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{field_name}={value!r}: {remedy}")


_MOST_MINUTES = 366 * 24 * 60

# Tokens that the pipelines of a family of models pad captions to; 0: the model reads no padding.
CAPTIONS = {"wan": 512, "sd3": 77 + 256, "flux": 512, "hunyuan": 0}


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
            _check(getattr(self, name) >= 1, f"parallel.{name}", getattr(self, name), "must be at least 1")
        minutes = self.timeout_minutes
        _check(
            0 < minutes <= _MOST_MINUTES,
            "parallel.timeout_minutes",
            minutes,
            f"must be positive, and at most {_MOST_MINUTES:,} (a year)",
        )
        inner, nested = self.context_parallel_inner, self.context_parallel == "a2a+p2p"
        fits = 1 < inner < self.cp and self.cp % inner == 0 if nested else inner == 0
        _check(
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
        _check(self.window >= 1, "pipeline.window", self.window, "must be at least 1")
        for name in ("forward", "input_gradient", "weight_gradient"):
            _check(getattr(self, name) > 0, f"pipeline.{name}", getattr(self, name), "must be positive")
        for name in ("cap", "message", "evaluations"):
            _check(getattr(self, name) >= 0, f"pipeline.{name}", getattr(self, name), "must not be negative")


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
    text_length: int = 0
    """Pad or cut captions to this many tokens; 0 keeps each caption's own length."""

    def __post_init__(self):
        weights = self.weights or (1,) * len(self.shards)
        _check(
            len(weights) == len(self.shards),
            "data.weights",
            self.weights,
            f"give one weight for each of the {len(self.shards)} folders",
        )
        _check(
            self.text_length >= 0,
            "data.text_length",
            self.text_length,
            "must not be negative; 0 keeps each caption's length",
        )
        _check(self.block >= 1, "data.block", self.block, "must be at least 1")
        _check(
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
        _check(
            self.bucket_size is None or self.bucket_size > 0,
            "optimizer.bucket_size",
            self.bucket_size,
            "must be positive",
        )
        _check(self.lr > 0, "optimizer.lr", self.lr, "must be positive")
        for name in ("ema", "alpha"):
            _check(
                0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1)"
            )
        _check(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "must be in [0, 1)")
        for name in ("eps", "weight_decay", "warmup"):
            _check(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "must not be negative")


@dataclass(frozen=True)
class FlowConfig:
    """Stage 0: flow matching."""

    condition_dropout: float = 0.1
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    """Shift of the logit-normal t towards noise (method: shift(t, s))."""

    def __post_init__(self):
        _check(
            0 <= self.condition_dropout <= 1,
            "flow.condition_dropout",
            self.condition_dropout,
            "is a probability",
        )
        _check(self.logit_std >= 0, "flow.logit_std", self.logit_std, "must not be negative")
        _check(self.shift > 0, "flow.shift", self.shift, "must be positive; 1 leaves t as it is")


@dataclass(frozen=True)
class ConsistencyConfig:
    """Stage 1: discrete-time consistency distillation with guidance folded in."""

    steps: int = 32
    shift: float = 24.0
    guidance_scale: float = 7.5

    def __post_init__(self):
        _check(self.shift > 0, "consistency.shift", self.shift, "must be positive; 1 leaves the grid uniform")
        _check(
            self.guidance_scale >= 0,
            "consistency.guidance_scale",
            self.guidance_scale,
            "must not be negative; 1 is no guidance",
        )
        _check(self.steps >= 1, "consistency.steps", self.steps, "must be at least 1")


@dataclass(frozen=True)
class AptConfig:
    """Stage 2: adversarial post-training. Every ablation of the paper is a change of one field."""

    loss: Literal["non_saturating", "hinge", "relativistic"] = "non_saturating"
    ar1_lambda: float = 100.0
    ar1_sigma: float = 0.01
    """In units of the scaled latent: 0.01 for images, 0.1 for videos."""
    ar2_lambda: float = 0.0
    ar2_sigma: float = 0.01
    timestep_shift: float = 1.0
    """s of the discriminator's t ~ shift(U(0, 1), s): 1 for images, 12 for videos."""
    timestep_fixed: float = -1.0
    """>= 0 gives the discriminator this t always; t = 0 is the collapse case of the paper."""
    discriminator_depth: float = 1.0
    """Share of the backbone's layers the discriminator keeps."""
    head_layers: tuple[float, ...] = (16 / 36, 26 / 36, 1.0)
    """Depths of the query heads, as fractions of the discriminator's layers, counted after the block."""
    train_backbone: bool = True
    """False freezes the discriminator's backbone and trains heads only (LADD, not APT)."""
    discriminator_init: Literal["diffusion", "distilled"] = "diffusion"
    discriminator_lr: float = 0.0
    """0 takes optimizer.lr."""
    discriminator_warmup: int = 0
    """Updates of linear warm-up of the discriminator; optimizer.warmup is the
    generator's. A longer one for the generator lets a discriminator whose heads start
    from nothing learn before it is followed.
    """
    head_lr_scale: float = 1.0
    unmatched_conditions: bool = False
    """Also shows the discriminator real samples with another sample's condition, as fakes."""
    condition_dropout: float = 0.0
    reuse_fakes: bool = False
    """Each generator update takes up the fakes of the discriminator update before it
    (same samples, noise and dropout), whose forward pass a pipeline then runs once for
    both, as far as memory allows. NOT the same training: G learns on fakes that D has
    just been trained on.
    """
    two_step_t: float = 0.5
    exact_r1_every: int = 0
    """Every so many iterations compute the exact R1 penalty beside aR1 (small scale only); 0 never."""

    def __post_init__(self):
        _check(self.ar1_lambda >= 0, "apt.ar1_lambda", self.ar1_lambda, "must not be negative")
        for name in ("ar2_lambda", "discriminator_lr", "discriminator_warmup", "exact_r1_every"):
            _check(getattr(self, name) >= 0, f"apt.{name}", getattr(self, name), "must not be negative")
        for name in ("ar1_sigma", "ar2_sigma", "timestep_shift", "head_lr_scale"):
            _check(getattr(self, name) > 0, f"apt.{name}", getattr(self, name), "must be positive")
        for name in ("condition_dropout", "two_step_t"):
            _check(0 <= getattr(self, name) <= 1, f"apt.{name}", getattr(self, name), "lies in [0, 1]")
        unpaired = self.loss != "relativistic"
        _check(
            unpaired or not self.unmatched_conditions,
            "apt.unmatched_conditions",
            True,
            "has no paired form; use another apt.loss",
        )
        _check(
            0 < self.discriminator_depth <= 1,
            "apt.discriminator_depth",
            self.discriminator_depth,
            "is a share in (0, 1]",
        )
        _check(
            bool(self.head_layers) and all(0 < f <= 1 for f in self.head_layers),
            "apt.head_layers",
            self.head_layers,
            "are fractions of depth in (0, 1]",
        )
        _check(
            self.timestep_fixed <= 1,
            "apt.timestep_fixed",
            self.timestep_fixed,
            "t lies in [0, 1]; negative means the ensemble",
        )


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
            _check(getattr(self, name) >= 0, f"guards.{name}", getattr(self, name), "must not be negative")
        _check(
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
            _check(getattr(self, name) >= 0, f"retention.{name}", getattr(self, name), "must not be negative")


@dataclass(frozen=True)
class RunConfig:
    method: Literal["flow", "consistency", "apt"] = "apt"
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    apt: AptConfig = field(default_factory=AptConfig)
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
            _check(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("global_batch", "micro_batch", "log_every"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _check(self.seed >= 0, "seed", self.seed, "must not be negative")
        _check(
            (not self.output or bool(self.output.strip())) and "\0" not in self.output,
            "output",
            self.output,
            "give the name of a folder",
        )
        _check_numbers(self)


def _check_numbers(config: object, prefix: str = "") -> None:
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
                _check(abs(number) < 2**63, name, value, "must be a finite number below 2^63")


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
    if config.method == "apt":
        _check_apt(config)
    padded = CAPTIONS.get(model.family, config.data.text_length)
    if config.data.text_length != padded:
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
    depth = round(model.depth * config.apt.discriminator_depth) if config.method == "apt" else model.depth
    if model.fp8.bf16_first + model.fp8.bf16_last >= depth:
        raise ValueError(
            f"{recipe}: bf16_first={model.fp8.bf16_first} + bf16_last={model.fp8.bf16_last} leave none of "
            f"{depth} blocks; lower them"
        )


def _check_ring(config: RunConfig) -> None:
    """Transformer Engine's rings know no packed samples: every microbatch must be of the uniform form."""
    parallel, ring = config.parallel, f"parallel.context_parallel={config.parallel.context_parallel!r}"
    length = config.data.text_length
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


def _check_apt(config: RunConfig) -> None:
    if config.apt.exact_r1_every and config.model.recompute == "full":
        raise ValueError(
            f"apt.exact_r1_every={config.apt.exact_r1_every} differentiates with respect to samples; it "
            "needs model.recompute=none"
        )
    if config.apt.exact_r1_every and config.parallel.pp > 1:
        raise ValueError(
            f"apt.exact_r1_every={config.apt.exact_r1_every} needs the whole discriminator on a rank; use "
            "parallel.pp=1 or set it to 0"
        )
    if config.micro_batch == 1 and config.guards.collapse_window:
        warnings.warn(
            "micro_batch=1 leaves no two samples to compare: the diversity alarm is off, only d/loss is "
            "watched",
            stacklevel=3,
        )


def to_dict(config: RunConfig) -> dict:
    """Plain JSON-ready form, written beside every checkpoint and log."""
    return asdict(config)
