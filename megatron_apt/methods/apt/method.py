"""Stage 2: adversarial post-training (APT paper, sections 3.3-3.5).

    x_hat = z - v(z, c, 1)
    L_G = mean g(D(x_hat))
    L_D = mean f(D(x), real) + mean f(D(x_hat), fake) + lambda mean (D(x) - D(x + sigma n))^2

    G phase   fake   G(full) -> D(input)                              updates generator
    D phase   real   D(full) on x and x + sigma n, one microbatch
              fake   G(none) -> D(full)                               updates discriminator

D sees clean samples and a timestep label t ~ shift(U(0, 1), s), one per sample; a sample
and its perturbation share label, condition, dropout and packing. A relativistic loss
compares real and fake logits, so there D takes both in one branch.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_apt.config import GuardConfig, RunConfig
from megatron_apt.conventions import one_step_sample, shift
from megatron_apt.data.microbatch import Microbatch, dropped, rolled
from megatron_apt.methods import losses
from megatron_apt.methods.apt import timings
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.base import (
    Branch,
    Grad,
    Inputs,
    Method,
    Metrics,
    Outputs,
    Phase,
    Role,
    Segment,
    Values,
)
from megatron_apt.methods.roles import generator
from megatron_apt.models import fp8, parameters
from megatron_apt.models.condition import Condition
from megatron_apt.models.discriminator import Discriminator
from megatron_apt.models.stages import Cut
from megatron_apt.parallel.mesh import Mesh

_UNPAIRED = {
    "non_saturating": (losses.non_saturating_d_real, losses.non_saturating_d_fake, losses.non_saturating_g),
    "hinge": (losses.hinge_d_real, losses.hinge_d_fake, losses.hinge_g),
}


def method(config: RunConfig, mesh: Mesh) -> Method:
    """Roles generator and discriminator; phases G and D, one update each."""
    branches = _relativistic(config.apt) if config.apt.loss == "relativistic" else _unpaired(config.apt)
    (g_branch, *d_branches) = branches
    repeated = "d" if config.apt.reuse_fakes else ""
    phases = (
        Phase("g", (g_branch,), updates="generator", repeats=repeated),
        Phase("d", tuple(d_branches), updates="discriminator"),
    )
    return Method(
        _roles(config, mesh),
        phases,
        summarise=summarise,
        signs_of_collapse=signs_of_collapse,
        correlated=(("check/r1_exact", "check/r1_approximate"), ("check/r1_exact", "d/ar1")),
        measure=_exact_r1(config.apt),
        measure_every=config.apt.exact_r1_every,
        # Captions are exchanged inside a microbatch
        least_samples=2 if config.apt.unmatched_conditions else 1,
    )


def _roles(config: RunConfig, mesh: Mesh) -> dict[str, Role]:
    apt = config.apt

    depth = apt.discriminator_blocks(config.model.depth)

    def build_discriminator(cut: Cut) -> Discriminator:
        model = Discriminator(config.model, mesh, depth, apt.head_blocks(depth), cut)
        parameters.initialise(model, mesh, config.seed)
        return model

    base_lr = apt.discriminator_lr or config.optimizer.lr

    def lr_scale(name: str) -> float:
        return (
            base_lr if name.startswith("backbone.") else base_lr * apt.head_lr_scale
        ) / config.optimizer.lr

    return {
        "generator": generator(config, mesh, config.init.generator),
        "discriminator": Role(
            build_discriminator,
            depth,
            source=config.init.diffusion if apt.discriminator_init == "diffusion" else config.init.generator,
            target="backbone",
            optimizer=replace(config.optimizer, warmup=apt.discriminator_warmup),
            trains=lambda name: apt.train_backbone or not name.startswith("backbone."),
            lr_scale=lr_scale,
        ),
    }


# --- what the networks see


def condition_of(batch: Microbatch, apt: AptConfig) -> Condition:
    """The samples' conditions, the same wherever they are used in one phase."""
    return dropped(batch, apt.condition_dropout, "dropout")


def label(batch: Microbatch, apt: AptConfig, purpose: str) -> Tensor:
    """Timestep label of D for each sample, (n,): t ~ shift(U(0, 1), s) (eq. 6, 7), or the
    fixed one of the ablation.
    """
    return (
        batch.times(apt.timestep_fixed)
        if apt.timestep_fixed >= 0
        else shift(batch.uniform(purpose), apt.timestep_shift)
    )


def _texts(apt: AptConfig, copies: int = 1):
    def condition(batch: Microbatch) -> Condition:
        return condition_of(batch, apt).repeat(copies)

    return condition


def _generate(apt: AptConfig, grad: Grad, branch: str) -> Segment:
    def feed(batch: Microbatch, _) -> Inputs:
        return batch.noise("z"), batch.times(1.0)

    return Segment(
        "generator",
        grad,
        _texts(apt),
        feed,
        ahead=("g", branch, 0) if apt.reuse_fakes and grad == "none" else None,
    )


def fakes(batch: Microbatch, outputs: Outputs) -> Tensor:
    return one_step_sample(batch.noise("z"), outputs[0])


def with_perturbed(
    batch: Microbatch, samples: Tensor, strength: float, sigma: float, purpose: str
) -> list[Tensor]:
    """[x], or [x, x + sigma n] where a regulariser of this strength compares the two."""
    return [samples, batch.perturbed(samples, sigma, purpose)] if strength else [samples]


def _discriminate(
    apt: AptConfig, grad: Grad, purpose: str, real: bool, fake: bool, regularised: bool = True
) -> Segment:
    """D on real samples, fakes or both, each with its perturbation where a penalty
    compares them: versions of the microbatch stacked as one.

    All versions of a sample share its label and condition.
    """
    ar1 = apt.ar1_lambda if real and regularised else 0.0
    ar2 = apt.ar2_lambda if fake and regularised else 0.0
    copies = (1 + bool(ar1)) * real + (1 + bool(ar2)) * fake

    def feed(batch: Microbatch, outputs: Outputs) -> Inputs:
        versions = with_perturbed(batch, batch.x, ar1, apt.ar1_sigma, "ar1") if real else []
        versions += with_perturbed(batch, fakes(batch, outputs), ar2, apt.ar2_sigma, "ar2") if fake else []
        return torch.cat(versions), torch.cat([label(batch, apt, purpose)] * copies)

    return Segment("discriminator", grad, _texts(apt, copies), feed, (0,) if fake else (), copies)


# --- losses over logits


def _penalised(
    batch: Microbatch, logits: Tensor, adversarial: Tensor, strength: float, name: str
) -> tuple[Tensor, Metrics]:
    """Adversarial loss of the first half of the logits, plus strength * (first half -
    second half)^2 if there is a second half.
    """
    loss = batch.sample_mean(adversarial)
    metrics = {"d/loss": loss.detach()}
    if strength:
        penalty = batch.sample_mean(losses.approximate_r1(*logits.chunk(2)))
        metrics[name] = penalty.detach()
        loss = loss + strength * penalty
    return loss, metrics


def _first(logits: Tensor, strength: float) -> Tensor:
    return logits.chunk(2)[0] if strength else logits


def _unpaired(apt: AptConfig) -> list[Branch]:
    d_real, d_fake, g = _UNPAIRED[apt.loss]

    def g_loss(batch: Microbatch, outputs):
        loss = batch.sample_mean(g(outputs[1]))
        return loss, {
            "g/loss": loss.detach(),
            "g/logit_fake": batch.sample_mean(outputs[1].detach()),
            **statistics(batch, outputs),
        }

    def real_loss(batch: Microbatch, outputs):
        real = _first(outputs[0], apt.ar1_lambda)
        loss, metrics = _penalised(batch, outputs[0], d_real(real), apt.ar1_lambda, "d/ar1")
        return loss, metrics | _logit_metrics(batch, real.detach(), real=True)

    def fake_loss(batch: Microbatch, outputs):
        fake = _first(outputs[1], apt.ar2_lambda)
        loss, metrics = _penalised(batch, outputs[1], d_fake(fake), apt.ar2_lambda, "d/ar2")
        return loss, metrics | _logit_metrics(batch, fake.detach(), real=False)

    frozen = _discriminate(apt, "input", "t_fake", real=False, fake=True, regularised=False)
    branches = [
        Branch(
            "fake",
            (_generate(apt, "full", "fake"), frozen),
            g_loss,
            reads=(0,),
            timings=timings.G_FAKE,
        ),
        Branch(
            "real",
            (_discriminate(apt, "full", "t_real", real=True, fake=False),),
            real_loss,
            timings=timings.D_REAL,
        ),
        Branch(
            "fake",
            (_generate(apt, "none", "fake"), _discriminate(apt, "full", "t_fake", real=False, fake=True)),
            fake_loss,
            timings=timings.D_FAKE,
        ),
    ]
    if apt.unmatched_conditions:
        unmatched = Segment(
            "discriminator",
            "full",
            lambda batch: rolled(batch.condition),
            lambda batch, _: (batch.x, label(batch, apt, "t_unmatched")),
        )
        branches.append(Branch("unmatched", (unmatched,), _unmatched_loss(d_fake)))
    return branches


def _unmatched_loss(d_fake):
    def loss(batch: Microbatch, outputs):
        value = batch.sample_mean(d_fake(outputs[0]))
        return value, {"d/loss_unmatched": value.detach()}

    return loss


def _relativistic(apt: AptConfig) -> list[Branch]:
    def g_loss(batch: Microbatch, outputs):
        real, fake = outputs[1].chunk(2)
        loss = batch.sample_mean(losses.relativistic_g(real, fake))
        return loss, {
            "g/loss": loss.detach(),
            "g/logit_fake": batch.sample_mean(fake.detach()),
            **statistics(batch, outputs),
        }

    def d_loss(batch: Microbatch, outputs):
        logits = list(outputs[1].chunk(2 + bool(apt.ar1_lambda) + bool(apt.ar2_lambda)))
        count = 2 if apt.ar1_lambda else 1
        reals, generated = logits[:count], logits[count:]
        loss, metrics = _penalised(
            batch, torch.cat(reals), losses.relativistic_d(reals[0], generated[0]), apt.ar1_lambda, "d/ar1"
        )
        if apt.ar2_lambda:
            penalty = batch.sample_mean(losses.approximate_r1(*generated))
            loss, metrics["d/ar2"] = loss + apt.ar2_lambda * penalty, penalty.detach()
        metrics |= _logit_metrics(batch, reals[0].detach(), real=True)
        metrics = _added(metrics, _logit_metrics(batch, generated[0].detach(), real=False))
        # This loss knows differences only, so only the order of a pair can be right or wrong.
        return loss, metrics | {"d/accuracy": batch.sample_mean((reals[0] > generated[0]).to(reals[0].dtype))}

    frozen = _discriminate(apt, "input", "t_pair", real=True, fake=True, regularised=False)
    trained = _discriminate(apt, "full", "t_pair", real=True, fake=True)
    return [
        Branch("pair", (_generate(apt, "full", "pair"), frozen), g_loss, reads=(0,)),
        Branch("pair", (_generate(apt, "none", "pair"), trained), d_loss),
    ]


# --- what is logged


def _logit_metrics(batch: Microbatch, logits: Tensor, real: bool) -> Metrics:
    """Mean logit, its part of the gap real - fake, and of the accuracy over both."""
    mean = batch.sample_mean(logits)
    right = (logits > 0) if real else (logits < 0)
    accuracy = 0.5 * batch.sample_mean(right.to(logits.dtype))
    return {
        f"d/logit_{'real' if real else 'fake'}": mean,
        "d/logit_gap": mean if real else -mean,
        "d/accuracy": accuracy,
    }


def _added(a: Metrics, b: Metrics) -> Metrics:
    return a | {name: a[name] + value if name in a else value for name, value in b.items()}


def statistics(batch: Microbatch, outputs: Outputs) -> Metrics:
    """Signs of collapse: mean and mean square of generated samples, and the mean squared
    distance between neighbours, fake and real.

    Neighbours in a batch are random pairs of samples, so their distance estimates the
    diversity across seeds. Needs samples of one size.
    """
    x_hat = fakes(batch, outputs).detach()
    metrics = {"sample/mean": batch.token_mean(x_hat), "sample/mean_square": batch.token_mean(x_hat.square())}
    comparable = batch.layout.visual.uniform and batch.layout.samples > 1
    for name, x in (("fake", x_hat), ("real", batch.x)):
        # Every rank reports the same names, whatever its own microbatches are, because
        # their values are summed as one vector.
        distance = x.new_zeros(())
        if comparable:
            x = batch.layout.visual.fold(x)
            distance = batch.token_mean((x - x.roll(1, 0)).square().flatten(0, 1))
        metrics[f"sample/distance_{name}"] = distance
    return metrics


def summarise(values: Values) -> Values:
    """Adds the standard deviation of generated samples and their diversity as a share of
    the real samples'.
    """
    values = dict(values)
    values["sample/std"] = max(values.pop("sample/mean_square") - values["sample/mean"] ** 2, 0.0) ** 0.5
    fake, real = values.pop("sample/distance_fake"), values.pop("sample/distance_real")
    if real > 0:
        values["sample/diversity"] = (fake / real) ** 0.5
    return values


def signs_of_collapse(values: Values, guards: GuardConfig) -> dict[str, str]:
    """Paper, section 5.1: the discriminator's loss goes to zero, and the generator makes
    flat plates that hardly differ.
    """
    signs = {}
    if values["d/loss"] < guards.collapse_d_loss:
        signs["d_loss"] = (
            f"d/loss {values['d/loss']:.4f} < guards.collapse_d_loss {guards.collapse_d_loss}: D has won; "
            "raise lambda or sigma of aR1"
        )
    if values.get("sample/diversity", 1.0) < guards.collapse_diversity:
        signs["diversity"] = (
            f"sample/diversity {values['sample/diversity']:.4f} < guards.collapse_diversity "
            f"{guards.collapse_diversity}: samples of different seeds are one; use a larger batch or a "
            "smaller learning rate"
        )
    return signs


def _exact_r1(apt: AptConfig):
    def compared(discriminator: Discriminator, batch: Microbatch) -> Metrics:
        condition = condition_of(batch, apt)
        x = batch.x.clone().requires_grad_(True)
        t, layout = (
            label(batch, apt, "t_pair" if apt.loss == "relativistic" else "t_real"),
            batch.layout_for(condition),
        )
        logits = discriminator(x, t, condition, layout)
        # Each context-parallel rank returns the same logits: a share of each makes the
        # ranks' contributions add up to their sum.
        (gradient,) = torch.autograd.grad(logits.sum() / batch.mesh.cp.size, x)
        with torch.no_grad():
            perturbed = discriminator(batch.perturbed(x, apt.ar1_sigma, "ar1"), t, condition, layout)
        exact = layout.sample_sum(gradient.square()).sum() / batch.global_batch
        approximate = batch.sample_mean(losses.approximate_r1(logits.detach(), perturbed)) / apt.ar1_sigma**2
        return {"check/r1_exact": exact, "check/r1_approximate": approximate}

    def measure(networks: dict, batch: Microbatch) -> Metrics:
        """E ||grad_x D(x)||^2 (eq. 8) on the real samples, with the labels and conditions
        of the D phase that follows.

        Measured beside aR1 / sigma^2 of the same weights, which estimates it to first
        order.
        """
        discriminator = networks["discriminator"]
        # Frozen, because layers that fuse the weight's gradient with its accumulation add
        # it to the update's, whatever autograd was asked for.
        with parameters.frozen(discriminator), fp8.without(discriminator):
            return compared(discriminator, batch.for_phase("d"))

    return measure
