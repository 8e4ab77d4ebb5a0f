"""Numbers, names of files and records that commands take from outside: each right, or
refused by one message that names field, value and remedy.
"""

import json
import math
import os

import pytest

from megatron_apt import outputs
from megatron_apt.cli import main
from megatron_apt.config import ParallelConfig, RunConfig
from megatron_apt.plan.memory import PlanConfig, memory, plan
from megatron_apt.plan.schedule import ScheduleConfig, parse_cost, schedule
from megatron_apt.schedule import calibration

NAN, INF = math.nan, math.inf
SMALL = {"ranks": 2, "microbatches": 2, "iterations": 1, "evaluations": 0}
CALIBRATION = {
    "device": "chip",
    "width": 64,
    "mlp_ratio": 4,
    "visual_tokens": 100,
    "text_tokens": 20,
    "blocks": {"bf16": {"F": 2.0, "I": 3.0, "W": 1.0}},
}


# --- numbers


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("ranks", (0, -1, 10**9)),
        ("microbatches", (0, -3, 10**9, 10**30)),
        ("iterations", (0, 10**9)),
        ("evaluations", (-2, 10**6)),
        ("seed", (10**30,)),
        ("cap", (-1.0, NAN, INF)),
        ("message", (-1.0, NAN, INF)),
        ("discriminator", (0.0, -1.0, NAN, INF, 1e300)),
    ],
)
def test_a_number_no_schedule_can_take_is_named(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{field}={value}".replace("+", r"\+")) as caught:
            ScheduleConfig(**{field: value})
        assert "between" in str(caught.value)


def test_windows_of_too_many_tasks_are_refused_and_counted_right():
    built = schedule_of(chunks=2)
    assert (
        ScheduleConfig(**SMALL, chunks=2).tasks
        >= len(built.graph.tasks) - 2 * built.graph.window.ranks
        > 0.6 * ScheduleConfig(**SMALL, chunks=2).tasks
    )
    with pytest.raises(ValueError, match=r"ranks=512, microbatches=512.*lower one"):
        ScheduleConfig(ranks=512, microbatches=512)
    with pytest.raises(ValueError, match=r"evaluations=10000.*lower one"):
        ScheduleConfig(ranks=32, microbatches=64, evaluations=10_000)


def schedule_of(**changes):
    from megatron_apt.plan.schedule import schedules

    return schedules(ScheduleConfig(**SMALL, **changes, compare=False))["interleaved"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "F",
        "F=",
        "F=1=2",
        "F=1,F=2",
        "F=nan",
        "F=inf",
        "F=0",
        "I=-1",
        "W=1e300",
        "memory=2",
        "f=1",
        "F=1;I=2",
        "F=" + "9" * 5000,
    ],
)
def test_a_cost_that_is_none_is_quoted(text):
    with pytest.raises(ValueError, match=r"F=1,I=1\.8,W=0\.3") as caught:
        parse_cost(text)
    assert repr(text[:300])[:-1] in str(caught.value) and len(str(caught.value)) < 500


def test_a_cap_in_which_nothing_fits_is_named():
    with pytest.raises(ValueError, match=r"cap=0\.5: .* allow more, or 0"):
        schedule_of(cap=0.5)


@pytest.mark.parametrize("ranks", [0, -1, 10**9])
def test_a_plan_names_ranks(ranks):
    with pytest.raises(ValueError, match=rf"ranks={ranks}: must lie between 1 and"):
        PlanConfig(ranks=ranks)


def test_a_plan_of_heads_that_do_not_split_is_refused():
    with pytest.raises(ValueError, match=r"heads=\d+ do not split over parallel\.tp=7"):
        memory(RunConfig(parallel=ParallelConfig(tp=7)), ranks=7)


# --- files that are written


def bad_places(folder):
    """name -> what the message says."""
    (folder / "a folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to(folder / "nothing" / "x")
    (folder / "file").write_text("kept")
    return {
        folder / "a folder": r"is a folder; give the name of a file",
        folder / "none" / "x.json": r"there is no folder .*none; make it first",
        folder / "file" / "x.json": r"Not a directory|there is no folder",
        folder / "pipe": "is no plain file",
        folder / "dangling": "a link to nothing; remove it",
        folder / ("x" * 300): "File name too long",
    }


def test_files_that_cannot_be_written_are_found_before_anything_is_read(tmp_path):
    for place, said in bad_places(tmp_path).items():
        with pytest.raises(ValueError, match=said) as caught:
            outputs.check("json", place)
        assert str(caught.value).startswith(f"json={place}"[:200])
    for options in ({"json": "json"}, {"dump": "dump"}, {"picture": "picture"}):
        (name,) = options
        with pytest.raises(ValueError, match=rf"^{name}=.*is a folder"):
            # Would take long
            schedule(ScheduleConfig(ranks=512, microbatches=4, **{name: str(tmp_path / "a folder")}))
    with pytest.raises(ValueError, match=r"^json=.*is a folder"):
        plan(None, PlanConfig(json=str(tmp_path / "a folder")))
    with pytest.raises(ValueError, match=r"picture=.*ends with none of \.png, \.svg"):
        schedule(ScheduleConfig(picture=str(tmp_path / "timeline.bmp")))
    assert (tmp_path / "file").read_text() == "kept" and sorted(path.name for path in tmp_path.iterdir()) == [
        "a folder",
        "dangling",
        "file",
        "pipe",
    ]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_permissions_are_looked_at_before_the_work(tmp_path):
    (tmp_path / "file").touch(mode=0o444)
    tmp_path.chmod(0o555)
    try:
        for name in ("file", "other"):
            with pytest.raises(ValueError, match="may not be written"):
                outputs.check("json", tmp_path / name)
    finally:
        tmp_path.chmod(0o755)


def test_good_places_are_written(tmp_path):
    outputs.check("json", "")
    outputs.check("json", "/dev/null")
    for name in ("a.json", "a.json"):  # new, then replaced
        outputs.check("json", tmp_path / name)
        outputs.write("json", tmp_path / name, "{}")
    assert (tmp_path / "a.json").read_text() == "{}"
    schedule(ScheduleConfig(**SMALL, json=str(tmp_path / "s.json"), dump=str(tmp_path / "s.txt")))
    assert set(json.loads((tmp_path / "s.json").read_text())["bubble"]) == {
        "apart_1f1b",
        "apart_zb",
        "interleaved",
    }


def test_what_cannot_be_written_after_all_is_named():
    with pytest.raises(ValueError, match=r"json=/proc/self/mem: cannot be written"):
        outputs.write("json", "/proc/self/mem", "{}")


# --- calibrations


def nested(depth: int) -> str:
    return json.dumps(CALIBRATION).replace('"chip"', "[" * depth + "]" * depth)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "Expected object"),
        ("null", "Expected object"),
        (nested(100_000), "nested too deeply"),
        (b"\xff\xfe\xfa", "not JSON"),
        *(({"device": value}, "device: Expected str") for value in (None, 3, [])),
        *(
            ({"width": value}, "width: (Expected int|Integer|Number)")
            for value in (0, -1, 1.5, "64", None, True, NAN, 10**30)
        ),
        *(
            ({"mlp_ratio": value}, "mlp_ratio: (Expected int|Integer|Number)")
            for value in (0, -1, "4", None, NAN, INF, 10**30)
        ),
        *(
            ({"visual_tokens": value}, "visual_tokens: (Expected int|Integer|Number)")
            for value in (0, -1, "1", INF, 10**30)
        ),
        *(
            ({"text_tokens": value}, "text_tokens: (Expected int|Integer|Number)")
            for value in (-1, "1", 10**30)
        ),
        *(({"blocks": value}, "blocks: Expected object") for value in (None, [], 3)),
        *(
            (
                {"blocks": {"bf16": {"F": value, "I": 1.0, "W": 1.0}}},
                r"blocks, bf16: F: (Expected float|Number)",
            )
            for value in (0.0, -1.0, NAN, INF, "1", None, 1e300)
        ),
        ({"blocks": {"bf16": {"F": 1.0}}}, "missing required field I"),
        ({"blocks": {"bf16": {"F": 1e-30, "I": 1.0, "W": 1.0}}}, "measure it again"),
        ({"blocks": {"fp8": {"F": 1.0, "I": 1.0, "W": 1.0}}}, "has no 'bf16'; it has 'fp8'"),
        ({"blocks": {}}, "has no 'bf16'; it has nothing"),
    ],
)
def test_a_calibration_that_is_none_is_refused_by_field(tmp_path, text, said):
    file = tmp_path / "calibration.json"
    file.write_bytes(
        json.dumps(CALIBRATION | text).encode()
        if isinstance(text, dict)
        else text.encode()
        if isinstance(text, str)
        else text
    )
    with pytest.raises(ValueError, match=said) as caught:
        calibration.read(str(file))
    message = str(caught.value)
    assert str(file) in message and len(message) < 700
    for field in ("width", "device"):  # without one at all
        file.write_text(json.dumps({key: value for key, value in CALIBRATION.items() if key != field}))
        with pytest.raises(ValueError, match=rf"missing required field {field}; .*gpu\.sh"):
            calibration.read(str(file))


def test_a_calibration_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, said in {
        "none.json": "No such file",
        "": "directory|plain",
        "pipe": "no plain file",
        "x" * 5000: "too long",
    }.items():
        with pytest.raises(ValueError, match=said) as caught:
            calibration.read(str(tmp_path / name))
        assert "gpu.sh" in str(caught.value)


def test_a_calibration_is_read_before_anything_is_counted(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: No such file"):
        plan(None, PlanConfig(calibration=str(tmp_path / "none.json")))


def test_the_command_says_it_in_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["schedule", "--ranks", "2", "--microbatches", "2", "--json", str(tmp_path / "none" / "x")])
    assert "json=" in str(ended.value) and "mkdir -p" in str(ended.value) and "\n" not in str(ended.value)
    for words in (["--ranks", "0"], ["--microbatches", "1000000000"]):
        with pytest.raises(SystemExit) as ended:
            main(["schedule", *words])
        name = words[0].removeprefix("--")
        assert f"{name}={words[1]}" in str(ended.value) + capsys.readouterr().err.replace("\n", " ")
