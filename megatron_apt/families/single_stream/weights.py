"""Weights of double and single blocks, as diffusers names them in both families that have them."""

from dataclasses import replace

from megatron_apt.convert.weights import ByHead, ColumnsByHead, Rule, Stacked, joined, layer
from megatron_apt.families.single_stream.config import SingleStreamConfig

ROOTS = frozenset(
    {
        "x_embedder",
        "context_embedder",
        "time_text_embed",
        "transformer_blocks",
        "single_transformer_blocks",
        "norm_out",
        "proj_out",
    }
)


def two_layers(ours: str, theirs: str) -> list[Rule]:
    return [rule for part in ("linear_1", "linear_2") for rule in layer(f"{ours}.{part}", f"{theirs}.{part}")]


def double_blocks(ours: str, theirs: str, by_head: ByHead) -> list[Rule]:
    """Blocks with separate weights."""
    rules = []
    for stream, qkv, norm, out, mlp, modulation in (
        ("visual", "to_{}", "norm", "to_out.0", "ff", "norm1"),
        ("text", "add_{}_proj", "norm_added", "to_add_out", "ff_context", "norm1_context"),
    ):
        rules += [
            *layer(f"{ours}.{stream}.modulation.linear", f"{theirs}.{modulation}.linear"),
            *joined(
                f"{ours}.{stream}.linear_qkv", [f"{theirs}.attn.{qkv.format(x)}" for x in "qkv"], by_head
            ),
            Rule(
                f"{ours}.{stream}.qk_norm.weight",
                (f"{theirs}.attn.{norm}_q.weight", f"{theirs}.attn.{norm}_k.weight"),
                Stacked(2),
            ),
            *layer(f"{ours}.{stream}.linear_proj", f"{theirs}.attn.{out}"),
            *layer(f"{ours}.{stream}.linear_fc1", f"{theirs}.{mlp}.net.0.proj"),
            *layer(f"{ours}.{stream}.linear_fc2", f"{theirs}.{mlp}.net.2"),
        ]
    return rules


def single_blocks(model: SingleStreamConfig, ours: str, theirs: str) -> list[Rule]:
    """Blocks with shared weights; theirs are numbered from 0 again."""
    size, mlp = model.head_size, model.mlp // model.heads
    inputs = [*(f"{theirs}.attn.to_{x}" for x in "qkv"), f"{theirs}.proj_mlp"]
    rules = [
        *layer(f"{ours}.modulation.linear", f"{theirs}.norm.linear"),
        *joined(f"{ours}.linear_in", inputs, ByHead(model.heads, (size, size, size, mlp))),
        Rule(
            f"{ours}.qk_norm.weight",
            (f"{theirs}.attn.norm_q.weight", f"{theirs}.attn.norm_k.weight"),
            Stacked(2),
        ),
        Rule(
            f"{ours}.linear_out.weight",
            (f"{theirs}.proj_out.weight",),
            ColumnsByHead(model.heads, (size, mlp)),
        ),
        Rule(f"{ours}.linear_out.bias", (f"{theirs}.proj_out.bias",)),
    ]
    return [replace(rule, ahead=model.double_blocks) for rule in rules]
