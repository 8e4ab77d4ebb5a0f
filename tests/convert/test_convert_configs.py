"""config.json of every family with every field wrong: what cannot be is one message that
names the field, before anything is built.
"""

import itertools
import json
from dataclasses import replace

import pytest
from safetensors.torch import save_file

from megatron_apt.convert.errors import ConvertError
from megatron_apt.convert.exporter import Checkpoint, export_pipeline
from megatron_apt.convert.importer import import_checkpoint
from megatron_apt.convert.source import open_source
from megatron_apt.families.hunyuan.config import HunyuanConfig
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.families.sd3.config import Sd3Config
from megatron_apt.families.wan.config import WanConfig
from megatron_apt.models.config import Fp8Config
from support.families import CONFIGS, FAMILIES, theirs

BAD = [
    -1,
    10**9,
    10**18,
    10**400,
    1e400,
    float("nan"),
    2.5,
    1e12,
    True,
    "3",
    "",
    None,
    [],
    [1],
    [[1, 2], 3],
    ["a"] * 3,
    [10**12] * 3,
    {"a": 1},
]
# Fields that may be anything of these kinds, because the value is one that a model may have.
ALLOWED = {
    ("out_channels", "None"),
    ("image_dim", "None"),
    ("added_kv_proj_dim", "None"),
    ("dual_attention_layers", "None"),
    ("dual_attention_layers", "[]"),
    ("dual_attention_layers", "[1]"),
}
ALLOWED |= {
    ("qk_norm", "None"),
    ("mlp_ratio", "2.5"),
    ("rope_theta", "2.5"),
    ("cross_attn_norm", "True"),
    ("guidance_embeds", "True"),
}
# What a message calls a field once it is one of ours, or of which it is a product.
ALIASES = {
    "axes_dims_rope": "rope_axes",
    "rope_axes_dim": "rope_axes",
    "dual_attention_layers": "dual_layers",
    "attention_head_dim": "projection_dim",
}


def checkpoint(family, folder, config):
    """A folder with this config.json and the weights of the family's first shape."""
    folder.mkdir(exist_ok=True)
    if not (folder / "model.safetensors").exists():
        save_file(
            {name: t.contiguous() for name, t in theirs(family, CONFIGS[family](0), 1).state_dict().items()},
            folder / "model.safetensors",
        )
    (folder / "config.json").write_text(
        json.dumps({"_class_name": FAMILIES[family][0].architecture, **config})
    )
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_every_field_that_is_wrong_is_named(family, tmp_path):
    good, ours = CONFIGS[family](0), FAMILIES[family][0]
    folder = checkpoint(family, tmp_path / "x", good)
    source = open_source(folder)
    source.bound(ours.model(source.config, folder))
    for field, bad in itertools.product(good, BAD):
        if (field, str(bad)) in ALLOWED or good[field] == bad:
            continue
        config = json.loads(json.dumps({"_class_name": ours.architecture, **good, field: bad}))
        with pytest.raises(ConvertError) as caught:
            source.bound(ours.model(config, folder))
            pytest.fail(f"{field}={bad!r} was taken")
        said = str(caught.value)
        named = field in said or ALIASES.get(field, field) in said
        assert named, (field, bad, said)
        assert len(said) < 600 and said.startswith(str(folder)), said


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_that_the_files_cannot_hold_is_not_begun(mesh, family, tmp_path):
    """Within what configurations may say, but far beyond the files: refused by their
    number of tensors and of numbers.
    """
    good, ours = CONFIGS[family](0), FAMILIES[family][0]
    deep, wide = {"num_layers": 9_000}, {_text(good): 900_000}
    for change, message in (
        (deep, r"asks for 9\d\d\d blocks, and the files hold \d+ tensors"),
        (wide, "text 900000 wide"),
    ):
        folder = checkpoint(family, tmp_path / "x", good | change)
        source = open_source(folder)
        with pytest.raises(ConvertError, match=message):
            import_checkpoint(source, ours, tmp_path / "run", mesh)


def _text(config: dict) -> str:
    return next(name for name in ("text_dim", "joint_attention_dim", "text_embed_dim") if name in config)


def test_a_state_that_describes_more_than_the_checkpoint_is_not_exported(mesh, tmp_path):
    config = CONFIGS["wan"](0)
    source = open_source(checkpoint("wan", tmp_path / "x", config))
    folder = import_checkpoint(source, FAMILIES["wan"][0], tmp_path / "run", mesh)
    checkpoint_ = Checkpoint.open(str(folder))
    deep = Checkpoint(
        folder,
        checkpoint_.state,
        replace(checkpoint_.model, depth=9_999),
        checkpoint_.prefix,
    )
    with pytest.raises(
        ConvertError, match=r"state\.json: describes 9999 blocks, and the files hold \d+ tensors"
    ):
        export_pipeline(deep, FAMILIES["wan"][0], tmp_path / "out", mesh)


@pytest.mark.parametrize(
    "make",
    [
        lambda bad: MMDiTConfig(depth=bad),
        lambda bad: MMDiTConfig(width=bad),
        lambda bad: MMDiTConfig(heads=bad),
        lambda bad: MMDiTConfig(mlp_width=bad),
        lambda bad: MMDiTConfig(text_width=bad),
        lambda bad: MMDiTConfig(patch=(1, bad, 2)),
        lambda bad: MMDiTConfig(patch=bad),
        lambda bad: (
            MMDiTConfig(rope_theta=bad) if not isinstance(bad, int) or bad < 0 else MMDiTConfig(depth=bad)
        ),
        lambda bad: MMDiTConfig(dtype=bad),
        lambda bad: MMDiTConfig(pooled_text=bad),
        lambda bad: WanConfig(image_width=bad),
        lambda bad: Sd3Config(position_size=bad),
        lambda bad: Sd3Config(dual_layers=bad),
        lambda bad: HunyuanConfig(refiner_blocks=bad),
        lambda bad: HunyuanConfig(rope_axes=(bad, 2, 2)),
        lambda bad: Fp8Config(history=bad),
    ],
)
def test_shapes_of_no_model_are_refused_at_once(make):
    for bad in (-1, 10**9, 10**18, 10**400, float("inf"), float("nan"), "x", None, [1], {}):
        with pytest.raises(ValueError, match=r"^\S+=.*: \S+"):
            make(bad)
