"""Measured costs of a block, read by the schedule and the planner."""

import json
from dataclasses import replace

import pytest

from megatron_apt.config import RunConfig
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.families.wan.config import WanConfig
from megatron_apt.plan.memory import iteration_seconds
from megatron_apt.plan.schedule import ScheduleConfig
from megatron_apt.schedule.calibration import read

STORED = {
    "device": "chip",
    "width": 64,
    "mlp_ratio": 4,
    "visual_tokens": 100,
    "text_tokens": 20,
    "blocks": {"bf16": {"F": 2.0, "I": 3.0, "W": 1.0}, "fp8 current": {"F": 1.0, "I": 2.0, "W": 0.5}},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(STORED))
    return path


def test_a_schedule_takes_the_measured_ratios(file):
    bf16, fp8 = (ScheduleConfig(calibration=source).unit for source in (str(file), f"{file}:fp8 current"))
    assert (bf16.F, bf16.I, bf16.W, bf16.memory) == (1.0, 1.5, 0.5, 1.0)
    assert (fp8.F, fp8.I, fp8.W) == (1.0, 2.0, 0.5)
    assert ScheduleConfig(calibration=str(file)).cost_text == "F=1,I=1.50,W=0.50 of chip, bf16"


def test_another_model_is_scaled_by_its_arithmetic(file):
    wide = read(str(file)).block(MMDiTConfig(width=128, recompute="full"))
    small, large = MMDiTConfig(width=64), MMDiTConfig(width=128)
    ratio = large.block_flops(100, 20) / small.block_flops(100, 20)
    assert small.block_flops(100, 20) == 2 * 120 * 12 * 64**2 + 4 * 120**2 * 64
    wan = WanConfig(width=64, mlp_width=100)
    assert (
        wan.block_flops(100, 20)
        == 2 * 100 * (6 * 64**2 + 2 * 64 * 100) + 2 * 20 * 2 * 64**2 + 4 * 64 * 100 * 120
    )
    assert pytest.approx((2 * ratio, 5 * ratio, ratio)) == (wide.F, wide.I, wide.W)


def test_the_least_time_of_an_iteration(file):
    """G phase: G F I W, D F I. D phase: real D twice F I W, fake G F and D F I W. All six blocks deep."""
    config = RunConfig(method="apt", global_batch=8)
    seconds = iteration_seconds(config, 4, read(str(file)))
    assert seconds == pytest.approx(6 * ((2 + 3 + 1) + (2 + 3) + 2 * (2 + 3 + 1) + 2 + (2 + 3 + 1)) * 8 / 4)
    half = replace(config, apt=replace(config.apt, discriminator_depth=0.5, head_layers=(0.5, 1.0)))
    assert iteration_seconds(half, 4, read(str(file))) == pytest.approx(
        (6 * (6 + 2) + 3 * (5 + 12 + 6)) * 8 / 4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": {}}, "has no 'bf16'; it has nothing"),
        ({"blocks": {"bf16": {"F": 0.0, "I": 1.0, "W": 1.0}}}, "bf16: F: Expected float > 0.0"),
        ({"blocks": {"bf16": {"F": 1.0}}}, "bf16: Object missing required field I"),
        ({"width": None}, "width: Expected int, got null"),
    ],
)
def test_a_bad_file_is_named(file, change, message):
    file.write_text(json.dumps(STORED | change))
    with pytest.raises(ValueError, match=message) as caught:
        read(str(file))
    assert str(file) in str(caught.value)


def test_a_missing_file_or_format_is_named(file, tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.json: No such file.*gpu\.sh"):
        read(str(tmp_path / "nothing.json"))
    with pytest.raises(ValueError, match=r"has no 'int4'; it has 'bf16', 'fp8 current'"):
        read(f"{file}:int4")
    file.write_text("{")
    with pytest.raises(ValueError, match=r"calibration\.json"):
        read(str(file))
