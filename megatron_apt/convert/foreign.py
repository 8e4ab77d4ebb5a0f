"""What a file of weights is that is no model of diffusers' under diffusers' names, told
by the names of its tensors, and what to do with it.

Also the names under which a model lies inside others (DDP, torch.compile, ComfyUI), which
are no part of its tensors' names.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_apt.convert.counterparts import counterparts
from megatron_apt.encoders.weight_files import printable

_MERGE = (
    "merge it into its model with diffusers (load_lora_weights, fuse_lora, unload_lora_weights and "
    "save_pretrained of the pipeline) and import the folder that gives"
)
_WHOLE = "give the transformer of a whole pipeline in diffusers' layout"
_UNQUANTISED = (
    "take the bf16, fp16 or fp32 weights of the same model, or load it with diffusers, call "
    "`transformer.dequantize()` and `save_pretrained(FOLDER)`"
)

# The first kind whose expression is found in a tensor's name is what the file is: (what, expression, remedy).
_KINDS: tuple[tuple[str, str, str], ...] = (
    ("a LoHa (an adapter like a LoRA)", r"\.hada_[wt][12]", _MERGE),
    ("a LoKr (an adapter like a LoRA)", r"\.lokr_[wt][12]", _MERGE),
    ("an OFT adapter (used like a LoRA)", r"\.(oft_(blocks|diag|R|scale)|boft_)", _MERGE),
    ("a DoRA (a LoRA with magnitudes)", r"\.(dora_scale|lora_magnitude_vector)", _MERGE),
    (
        "a LoRA (an adapter, not a model)",
        r"(^|[._])lora_(A|B|up|down|mid|E|embedding_[AB]|unet|te\d?|transformer|prior)\b|(^|\.)lora_(unet|te\d?|transformer|prior)_|"
        r"[._]lora\.(up|down)\.|_lora\.(up|down)|lora_linear_layer\.|\.lora_[a-zA-Z_]+$",
        _MERGE,
    ),
    (
        "a set of differences to a model (an adapter, extracted as a LoRA is)",
        r"\.(diff|diff_b|set_weight)$",
        _MERGE,
    ),
    (
        "quantised",
        r"(^|\.)scaled_fp8$|\.(scale_weight|scale_input|weight_scale(_2|_inv)?|input_scale|comfy_quant|SCB|weight_format|absmax|quant_map|"
        r"nested_absmax|quant_state\.\w+|qweight|qzeros|g_idx|weight_packed|weight_zero_point|smooth_factor(_orig)?|wscales|_data|_scale)$|"
        r"\.weight\.(absmax|quant_map|nested|quant_state|_data|_scale)",
        _UNQUANTISED,
    ),
    (
        "a textual inversion (embeddings of new words)",
        r"^(emb_params|string_to_param|string_to_token|<[^>]*>|clip_[lg]|t5xxl)$",
        _WHOLE,
    ),
    (
        "a ControlNet",
        r"(^|\.)(controlnet_\w+|control_model|input_hint_block|zero_convs|lllite_\w+|control_\w*blocks)(\.|$)",
        _WHOLE,
    ),
    (
        "a Wan VACE (a transformer with controls beside the video)",
        r"(^|\.)vace_(blocks|patch_embedding)\.",
        _WHOLE,
    ),
    (
        "the state of an optimiser",
        r"(^|\.)(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|square_avg)(\.|$)",
        _WHOLE,
    ),
    ("a T2I adapter", r"^adapter\.(body|conv_in)\.", _WHOLE),
    (
        "an IP-Adapter",
        r"(^|\.)(ip_adapter|image_proj)\.|\.(to_[kv]_ip|add_[kv]_proj_ip)\.|_ip\.(weight|bias)$",
        _WHOLE,
    ),
)

# Whole models of other kinds; looked for only where nothing of a transformer is found.
_OTHERS: tuple[tuple[str, str], ...] = (
    (
        "a VAE",
        r"^(quant_conv|post_quant_conv|conv1|conv2|(encoder|decoder)\.(conv_in|conv_out|conv1|up_blocks|down_blocks|mid_block|mid|up|down|"
        r"upsamples|downsamples|middle|head))\b",
    ),
    (
        "a text encoder (T5)",
        r"^(shared\.weight|encoder\.(block\.\d+\.layer|embed_tokens|final_layer_norm)|token_embedding\.weight)",
    ),
    ("an image encoder (CLIP)", r"^(vision_model|visual)\."),
    (
        "a text encoder (CLIP)",
        r"^(text_model|text_projection|resblocks)\b|^embeddings\.(token|position)_embedding",
    ),
    ("a language model", r"^(layers\.\d+\.self_attn|embed_tokens|lm_head|language_model)\b"),
    (
        "a UNet of Stable Diffusion 1, 2 or XL",
        r"^(input_blocks|output_blocks|middle_block|down_blocks\.\d|up_blocks\.\d|mid_block)\b",
    ),
    ("a transformer of LTX-Video", r"^patchify_proj\."),
    ("a transformer of Mochi", r"^blocks\.\d+\.attn\.qkv_x"),
    ("a transformer of AuraFlow", r"^double_layers\.\d"),
    ("a transformer of Lumina or Z-Image", r"^cap_embedder\."),
    ("a transformer of CogVideoX", r"^patch_embed\.text_proj"),
    ("a transformer of Qwen-Image", r"\.img_mod\.\d"),
    ("a transformer of Sana", r"^blocks\.\d+\.cross_attn\.q_linear"),
    ("a transformer of FLUX.2", r"^double_stream_modulation_img\."),
    ("Wan Animate", r"^(face_adapter|motion_encoder)\."),
    ("a discriminator that `convert export --discriminator` wrote", r"^(backbone|heads)\.\w"),
)

_WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "base_layer",
    "module",
)  # may stand anywhere in a name
# Prefixes that are taken off before a file's kind is looked for, whatever its family.
_OUTER = re.compile(
    r"^(model\.diffusion_model|diffusion_model|first_stage_model|cond_stage_model|vae|model|module|_orig_mod|transformer|net|dit|base_model)\."
)
# Other parts of a file that holds a whole pipeline; of no family the beginning of a name.
_BESIDE = re.compile(
    r"^(first_stage_model|cond_stage_model|conditioner|vae|text_encoders?(_\d)?|model_ema)\.|^(clip_[lg]|t5xxl|umt5xxl)\."
)


@dataclass(frozen=True)
class Plain:
    """A file's tensors under the names that diffusers gives them.

    Attributes:
        names: name in the file, for each plain one.
        prefixes: what was taken off, in order of how often.
        beside: beginnings of the names of other parts, which are left out.
    """

    names: dict[str, str]
    prefixes: tuple[str, ...]
    beside: tuple[str, ...]


def plain(names: Iterable[str], architecture: str) -> Plain:
    """Takes off what stands before a family's own names.

    Raises:
        ValueError: the model is in it more than once.
    """
    family, found = counterparts().get(architecture), {}
    roots = family.roots if family else frozenset()
    prefixes, beside = Counter(), {}
    for name in names:
        if part := _BESIDE.match(name):
            beside[part[0]] = True
            continue
        prefix, short = _split(name, roots)
        if short in found:
            raise ValueError(
                f"has {short} more than once, as {found[short]} and {name}: a file of several models, such "
                "as a student and its average"
            )
        found[short] = name
        if prefix:
            prefixes[prefix] += 1
    if not found:  # other parts alone
        return Plain({name: name for name in names}, (), ())
    return Plain(found, tuple(prefix for prefix, _ in prefixes.most_common()), tuple(beside))


def _split(name: str, roots: frozenset[str]) -> tuple[str, str]:
    """What stands before the first word that begins a family's names, and the name from
    there; without one, nothing and the name.
    """
    words = name.split(".")
    first = next((i for i, word in enumerate(words) if word in roots), None)
    if first is None:
        return "", name
    kept = [word for word in words[first:] if word not in _WRAPPERS]
    inner = [word for word in words[first:] if word in _WRAPPERS]
    prefix = "".join(f"{word}." for word in words[:first]) or "".join(
        f"{word}." for word in dict.fromkeys(inner)
    )
    return prefix, ".".join(kept)


def what_it_is(names: Iterable[str], architecture: str = "") -> str | None:
    """What to say of a file that is no transformer under diffusers' names; None where
    nothing is known of it.

    Args:
        architecture: the family of the config.json that it is to be read by.
    """
    names = list(names)
    if kind := kind_of(names):
        return kind
    bare = [_bare(name) for name in names if not _BESIDE.match(name)] or [_bare(name) for name in names]
    for owner, family in counterparts().items():
        authors, own = family.authors, architecture == owner
        hit = _first(bare, rf"(^|\.)({authors.names})")
        if hit is None and own and authors.own_names:
            hit = _first(bare, authors.own_names)
        if hit:
            other = "" if own or not architecture else f", and config.json is of a {architecture}"
            return (
                f"it has its authors' names ({authors.title}: {printable(hit)}), not diffusers'{other}: "
                f"{rewrite(owner)}"
            )
    known = counterparts()
    read_by = [known[architecture]] if architecture in known else known.values()
    roots = frozenset().union(*(family.roots for family in read_by))
    if 2 * sum(name.split(".")[0] in roots for name in bare) <= len(bare):
        for kind, expression in _OTHERS:
            if hit := _first(bare, expression):
                return f"it is {kind}, by its tensor {printable(hit)}: {_WHOLE}"
    return None


def kind_of(names: Iterable[str]) -> str | None:
    """What to say of adapters, quantised weights and the like; None of other files."""
    names = list(names)
    for kind, expression, remedy in _KINDS:
        if hit := _first(names, expression):
            return f"it is {kind}, by its tensor {printable(hit)}: {remedy}"
    return None


def rewrite(architecture: str) -> str:
    """What to do with a checkpoint under its authors' names."""
    return (
        f"`diffusers.{architecture}.from_single_file(FILE, "
        "config=FOLDER_OF_CONFIG_JSON).save_pretrained(FOLDER)` renames them"
    )


def _bare(name: str) -> str:
    while match := _OUTER.match(name):
        name = name[match.end() :]
    return name


def _first(names: list[str], expression: str) -> str | None:
    pattern = re.compile(expression)
    return next((name for name in names if pattern.search(name)), None)
