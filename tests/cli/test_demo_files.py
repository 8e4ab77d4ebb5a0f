"""The demo's folder and its report: damaged records are named, two demos exclude each
other, signals end them with a line, text is escaped.
"""

import json
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from megatron_apt.config import GuardConfig
from megatron_apt.demo import digits, suite
from megatron_apt.demo import processes as launch
from megatron_apt.demo.command import _remaining, rewrite_report
from megatron_apt.demo.files import load_progress, prepare
from megatron_apt.demo.interrupts import Interrupts
from megatron_apt.demo.machine import this_machine
from megatron_apt.demo.recipes import DemoConfig, Place
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import EncodeConfig
from megatron_apt.lock import FolderInUse, FolderLock
from megatron_apt.training.guards import Stopped
from support.page import Page

NUMBERS = {"frechet": 1.5, "accuracy": 0.9, "diversity": 0.4, "samples": 160, "seconds_per_sample": 0.01}
PROGRESS = {
    "quick": True,
    "done": ["images/encode", "images/flow", "images/flow/evaluation"],
    "seconds": {"images/flow": 1.0},
}
ROW, OTHER = suite.SUITES["images"][:2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo whose first network has been measured, with a caption that is HTML."""
    root = tmp_path_factory.mktemp("demo")
    manifest = digits.write_digit_images(root / "data" / "images-files", count=40)
    manifest.write_text(
        manifest.read_text().replace("a handwritten zero", "<script>alert(1)</script> &amp; 'zero'")
    )
    encode(
        EncodeConfig(
            str(manifest),
            str(root / "data" / "images"),
            8,
            8,
            1,
            pixel_channels=1,
            pixel_temporal=1,
            text_width=8,
        ),
        progress=False,
    )
    shown = len(suite.shown_samples(suite.real_data(str(root / "data" / "images")).shards))
    folder = root / "evaluation" / "images"
    folder.mkdir(parents=True)
    for row in (ROW, OTHER):
        (folder / f"{row.key}.json").write_text(json.dumps(NUMBERS))
        save_file({"latents": torch.zeros(shown, 1, 1, 8, 8)}, folder / f"{row.key}.safetensors")
    (root / "progress.json").write_text(json.dumps(PROGRESS))
    (root / "images" / "flow").mkdir(parents=True)
    (root / "images" / "flow" / "log.jsonl").write_text(
        '{"iteration": 1, "loss": 1.0}\n{"iteration": 2, "loss": 0.5}\n'
    )
    return root


@pytest.fixture
def demo(finished, tmp_path, monkeypatch):
    real = suite.real_data(str(finished / "data" / "images"))
    monkeypatch.setattr(suite, "real_data", lambda folder: real)  # the copy's are the same
    return shutil.copytree(finished, tmp_path / "demo", ignore=shutil.ignore_patterns("images-files"))


def report(root, **changes):
    return rewrite_report(DemoConfig(root=str(root), **changes))


def test_the_report_is_what_was_measured_and_escapes_captions(demo):
    text = report(demo).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script>alert" not in text and "<script>alert(1)</script> &amp; 'zero'" in page.text
    assert any(image["alt"].startswith("<script>alert(1)</script> &amp; 'zero'") for image in page.images)
    results = json.loads((demo / "results.json").read_text())
    assert results["images"]["fd"] == {ROW.key: 1.5, OTHER.key: 1.5} and results["seconds"] == {
        "images/flow": 1.0,
        "total": 1.0,
    }
    assert results["quick"] is True and "machine" not in results
    assert "images/consistency" in page.text and "still to come" in page.text
    assert "Trial run." in page.text and (demo / "strip.png").read_bytes().startswith(b"\x89PNG")
    report(demo, quick=False)  # which of the two it is stands in progress.json


@pytest.mark.parametrize("name", ["nothere", "a/b/c", "file", "."])
def test_a_folder_without_a_demo_is_told_from_one(tmp_path, name):
    (tmp_path / "file").write_text("x")
    root = re.escape(str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"root={root}: .*run `megatron-apt demo --root {root}` first"):
        report(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_root_is_refused():
    for root in ("", " "):
        with pytest.raises(ValueError, match=r"root='.*': give the name of a folder"):
            DemoConfig(root=root)


def _replaced(file, how):
    """Puts something else in a file's place; returns what the message says."""
    before = file.read_bytes() if file.is_file() else b""
    file.unlink(missing_ok=True)
    if how == "a folder":
        file.mkdir()
    elif how == "a pipe":
        os.mkfifo(file)
    elif how == "a dangling link":
        file.symlink_to("nothing")
    else:
        file.write_bytes(
            {
                "empty": b"",
                "cut": before[: len(before) // 2],
                "nested": b"[" * 100_000,
                "not UTF-8": b"\xff" * 50,
            }[how]
        )


@pytest.mark.parametrize(
    "how", ["a folder", "a pipe", "a dangling link", "empty", "cut", "nested", "not UTF-8"]
)
@pytest.mark.parametrize(
    "name", ["progress.json", f"evaluation/images/{ROW.key}.json", f"evaluation/images/{ROW.key}.safetensors"]
)
def test_a_damaged_record_is_named_with_the_command_that_makes_it_again(demo, name, how):
    _replaced(demo / name, how)
    with pytest.raises(
        ValueError,
        match=rf"^{re.escape(str(demo / name))}: .*`megatron-apt demo --root {re.escape(str(demo))}`",
    ) as caught:
        report(demo)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("progress.json", {"done": 10**30}, "done: "),
        ("progress.json", {"done": ["a", 1]}, "done"),
        ("progress.json", {"done": None}, "done: Expected array"),
        ("progress.json", {"quick": "yes"}, "quick: Expected bool"),
        ("progress.json", {"seconds": {"a": float("nan")}}, "seconds"),
        ("progress.json", {"seconds": {"a": -1}}, "seconds"),
        ("progress.json", {"seconds": {"a": 1e300}}, "seconds"),
        ("progress.json", {"seconds": []}, "seconds: Expected object"),
        ("progress.json", {"machine": {"processor": "x"}}, "machine: "),
        *(
            (f"evaluation/images/{ROW.key}.json", {key: value}, f"{key}: ")
            for key in NUMBERS
            for value in ("1", None, [])
        ),
        (f"evaluation/images/{ROW.key}.json", {"samples": -1}, "samples: "),
    ],
)
def test_a_record_of_wrong_types_is_named_by_field(demo, name, change, said):
    file = demo / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: {said}.*demo --root"):
        report(demo)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"other": torch.zeros(2)},
        {"latents": torch.zeros(3, 1, 1, 8, 8)},
        {"latents": torch.zeros(20, 1, 1, 8, 8, dtype=torch.int64)},
    ],
)
def test_samples_of_another_shape_are_named(demo, tensors):
    file = demo / "evaluation" / "images" / f"{ROW.key}.safetensors"
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(file))}: holds .*expected float32 \(\d+, 1, 1, 8, 8\)"
    ):
        report(demo)


def test_figures_that_are_damaged_are_measured_again(demo, capsys):
    config = DemoConfig(root=str(demo), quick=True, stage="images")

    def remaining():
        return [stage.name for stage in _remaining(config, load_progress(config))]

    assert remaining()[0] == "images/consistency"
    (demo / "evaluation" / "images" / f"{OTHER.key}.safetensors").write_bytes(b"x")
    assert remaining()[:2] == ["images/flow/evaluation", "images/consistency"]
    assert f"{OTHER.key}.safetensors" in capsys.readouterr().out
    assert (
        suite.trouble(Place(str(demo)), "images", ROW)
        == ""
        != suite.trouble(Place(str(demo)), "images", OTHER)
    )


def test_the_machine_of_the_run_is_in_results_and_report(demo):
    progress = PROGRESS | {"quick": False, "machine": this_machine() | {"processor": "A & B"}}
    (demo / "progress.json").write_text(json.dumps(progress))
    page = Page(report(demo).read_text(encoding="utf-8"))
    results = json.loads((demo / "results.json").read_text())
    assert results["machine"] == progress["machine"] and results["quick"] is False
    assert "A & B, " in page.text and "Trial run." not in page.text


@pytest.mark.parametrize("name", ["results.json", "report.html", "strip.png"])
def test_a_report_that_cannot_be_written_is_named(demo, name):
    (demo / name).unlink(missing_ok=True)
    (demo / name / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{name}: cannot be written .*remove what stands there"):
        report(demo)
    assert not list(demo.glob(".*.partial"))


def test_a_second_demo_in_the_same_folder_is_refused_by_name(demo):
    config = DemoConfig(root=str(demo), quick=True)
    with (
        FolderLock(demo, "a demo"),
        pytest.raises(FolderInUse, match=rf"in use for a demo by process {os.getpid()}.*another --root"),
    ):
        prepare(config)
    prepare(config)
    with pytest.raises(ValueError, match="quick=True, this run asks for quick=False"):
        prepare(DemoConfig(root=str(demo)))
    assert not (demo / ".lock").exists()


@pytest.mark.parametrize("name", ["file", "file/x"])
def test_a_root_that_is_a_file_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match=r"file.*cannot be written .*another --root"):
        prepare(DemoConfig(root=str(tmp_path / name)))
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("error", ["KeyboardInterrupt()", "os.kill(os.getpid(), signal.SIGINT)", "stopped"])
def test_a_signal_ends_the_demo_with_a_line(capsys, error):
    mesh = SimpleNamespace(is_main=True, world=SimpleNamespace(size=1))
    with pytest.raises(SystemExit) as ended, Interrupts(DemoConfig(root="here"), mesh):
        if error.startswith("os"):
            os.kill(os.getpid(), signal.SIGINT)
        raise Stopped(signal.SIGINT, GuardConfig()) if error == "stopped" else KeyboardInterrupt
    assert ended.value.code == 130
    assert (
        capsys.readouterr().err == "megatron-apt: here: the demo was interrupted; the same command goes on\n"
    )


def test_other_errors_pass():
    mesh = SimpleNamespace(is_main=True, world=SimpleNamespace(size=1))
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    with pytest.raises(ValueError, match="as it is"), Interrupts(DemoConfig(), mesh):
        raise ValueError("as it is")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("code", "expected"), [("0", 0), ("3", 3), ("-9", 137)])
def test_the_ranks_are_started_and_the_first_failure_is_the_exit_code(tmp_path, code, expected):
    program = (
        "import os, sys, pathlib; rank = os.environ['RANK']; pathlib.Path(sys.argv[1], rank).write_text(' "
        "'.join(os.environ[n] for n in ('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')));code = int(sys.argv[2]) "
        "if rank == '1' else 0; os.kill(os.getpid(), 9) if code < 0 else sys.exit(code)"
    )
    assert launch.run_ranks([sys.executable, "-S", "-c", program, str(tmp_path), code], 2) == expected
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "0": "2 0 127.0.0.1",
        "1": "2 1 127.0.0.1",
    }


def test_a_rank_that_does_not_end_after_another_failed_is_ended(monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.2)
    program = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '0' else time.sleep(1000)"
    assert launch.run_ranks([sys.executable, "-S", "-c", program], 2) == 7
