"""Small problems with known data, for tests that compare one way of computing with another."""

from dataclasses import replace
from functools import partial

import torch

from megatron_apt.config import InitConfig, OptimizerConfig, RunConfig
from megatron_apt.data.microbatch import Microbatch, pack_latents
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.build import build_method
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import patch_grid, patchify
from megatron_apt.models.layout import build_layout
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.schedule.execute import Executor
from megatron_apt.schedule.prepare import Pipeline, one_rank, without_update
from megatron_apt.training.networks import Network

IMAGES = ((4, 1, 8, 8),) * 4
VIDEOS = ((4, 2, 4, 8),) * 4
MIXED = ((4, 1, 4, 4), (4, 2, 4, 6), (4, 1, 8, 6), (4, 3, 4, 4))


def model_config(**changes) -> ModelConfig:
    return replace(MMDiTConfig(depth=3, width=48, heads=4, latent_channels=4, text_width=8), **changes)


def run_config(
    method: str = "apt", model: ModelConfig | None = None, apt: AptConfig | None = None, **changes
) -> RunConfig:
    """A run from seeded random weights (no checkpoint)."""
    optimizer = OptimizerConfig(kind="rmsprop" if method == "apt" else "adamw", lr=1e-3, ema=0.9)
    base = RunConfig(
        method=method,
        model=model or model_config(),
        apt=apt or AptConfig(),
        optimizer=optimizer,
        init=InitConfig(),
        global_batch=4,
        micro_batch=4,
    )
    return replace(base, **changes)


def microbatch(
    mesh: Mesh,
    shapes,
    model: ModelConfig,
    text_lengths=(3, 3, 3, 3),
    seed: int = 0,
    iteration: int = 0,
    global_batch: int = 4,
    rows=None,
) -> Microbatch:
    """The same samples on every mesh; each context-parallel rank keeps its tokens. `rows`
    takes some of them.
    """
    dtype = torch.float64 if model.dtype == "float64" else torch.float32
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    texts = [
        torch.randn(length, model.text_width, generator=generator, dtype=torch.float64).to(dtype)
        for length in text_lengths
    ]
    null, negative = (
        torch.randn(2, model.text_width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    pooled, *pooled_fixed = (_pooled(model, n, generator, dtype) for n in (len(shapes), 1, 1))
    given, images = _first_frames(model, shapes, generator, dtype)
    rows = tuple(range(len(shapes))) if rows is None else tuple(rows)
    shapes, latents, texts = (tuple(values[i] for i in rows) for values in (shapes, latents, texts))
    tokens = pack_latents(shapes, model.patch, lambda some, _: torch.stack([latents[i] for i in some]))
    condition = Condition.pack(texts, pooled=None if pooled is None else pooled[list(rows)]).to(mesh.device)
    pictures = {"visual": torch.cat([given[i] for i in rows])} if given else {}
    pictures |= {"image": images[list(rows)]} if images is not None else {}
    if model.first_frame:
        clips = [patchify(latent[None, :, :1], model.patch) for latent in latents if latent.shape[1] > 1]
        pictures["first"] = torch.cat([latents[0].new_empty(0, model.patch_width), *clips]).to(dtype)
    framed = partial(replace, **{name: value.to(mesh.device) for name, value in pictures.items()})
    layout = build_layout(tuple(patch_grid(s[1:], model.patch) for s in shapes), condition.lengths, mesh)
    return Microbatch(
        mesh=mesh,
        patch=model.patch,
        positions=torch.tensor(rows, device=mesh.device) + 100,
        sample_ids=rows,
        shapes=shapes,
        x=tokens.to(mesh.device, dtype).index_select(0, layout.visual.index),
        condition=framed(condition),
        null=framed(Condition.pack([null], pooled=pooled_fixed[0]).repeat(len(shapes)).to(mesh.device)),
        negative=framed(
            Condition.pack([negative], pooled=pooled_fixed[1]).repeat(len(shapes)).to(mesh.device)
        ),
        seed=7,
        iteration=iteration,
        global_batch=global_batch,
    )


def _pooled(
    model: ModelConfig, n: int, generator: torch.Generator, dtype: torch.dtype
) -> torch.Tensor | None:
    """Pooled texts of a family that has its own; None: the mean of the text serves."""
    if model.pooled_width == model.text_width:
        return None
    return torch.randn(n, model.pooled_width, generator=generator, dtype=torch.float64).to(dtype)


def _first_frames(
    model: ModelConfig, shapes, generator: torch.Generator, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Tokens of the channels each sample is given, and its image tokens (n, L, E), of
    models that read them.
    """

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    given = (
        [patchify(normal(1, model.condition_channels, *shape[1:]), model.patch) for shape in shapes]
        if model.condition_channels
        else []
    )
    return given, normal(len(shapes), *model.image_shape) if model.image_shape else None


def waken(networks: dict[str, Network], seed: int = 1) -> None:
    """Random values where initialisation puts zeros (modulation, last layer), so that
    every gradient is alive. Equal on every mesh.
    """
    from megatron_apt.kernels.keyed_noise import derive_key
    from megatron_apt.models.parameters import full_shape

    for network in networks.values():
        mesh = network.mesh
        for name, parameter in network.module.named_parameters():
            generator = torch.Generator().manual_seed(derive_key(seed, network.name, name) >> 1)
            whole = 0.1 * torch.randn(full_shape(parameter, mesh), generator=generator, dtype=torch.float64)
            if parameter.sharded_dim is not None:
                whole = whole.chunk(mesh.tp.size, parameter.sharded_dim)[mesh.tp.rank]
            with torch.no_grad():
                parameter.add_(whole.to(parameter))
        if network.shards is not None:
            network.shards.adopt()
            network.begin_average()


def build(config: RunConfig, mesh: Mesh):
    method = build_method(config, mesh)
    pipeline = Pipeline(config.pipeline, method, mesh)
    networks = {name: Network(name, role, mesh, pipeline.cut(name)) for name, role in method.roles.items()}
    waken(networks)
    return method, networks, Executor(networks, mesh)


def run_phase(executor: Executor, phase, batches) -> dict:
    """Gradients of one phase on one stage, without its update; returns the metrics' contributions."""
    (metrics,) = executor.run(
        without_update(one_rank((phase,), len(batches))), lambda _: batches, lambda task: None
    )
    return metrics


def gradient_of(network: Network) -> torch.Tensor:
    """The gradient accumulated so far, of every parameter, as one vector."""
    return torch.cat([p.main_grad.flatten() for p in network.shards.parameters])


def phase_gradients(config: RunConfig, mesh: Mesh, shapes, text_lengths=(3, 3, 3, 3)) -> dict:
    """Metrics and every whole (unsharded) gradient of each phase, from the same weights."""
    method, networks, executor = build(config, mesh)
    batch = microbatch(mesh, shapes, config.model, text_lengths)
    result = {}
    for phase in method.phases:
        metrics = run_phase(executor, phase, [batch])
        shards = networks[phase.updates].shards
        shards.reduce_gradients()
        parameters = dict(zip(shards.names, shards.parameters, strict=True))
        gradients = {name: whole(grad, parameters[name], mesh) for name, grad in shards.whole_gradients()}
        result[phase.name] = {
            "metrics": {k: summed(v, mesh) for k, v in metrics.items()},
            "gradients": gradients,
        }
    return result


def summed(value: torch.Tensor, mesh: Mesh) -> float:
    value = value.detach().double().clone()
    torch.distributed.all_reduce(value, group=mesh.dp_cp.group)
    return float(value)


def whole(tensor: torch.Tensor, parameter, mesh: Mesh) -> torch.Tensor:
    """The tensor over all tensor-parallel ranks."""
    if parameter.sharded_dim is None or mesh.tp.size == 1:
        return tensor.clone()
    parts = [torch.empty_like(tensor) for _ in range(mesh.tp.size)]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=mesh.tp.group)
    return torch.cat(parts, parameter.sharded_dim)
