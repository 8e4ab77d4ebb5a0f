"""The scripts under tools/: bad arguments and files of the wrong kind end with one
message, before any work.
"""

import os
import re
import sys
from pathlib import Path

import pytest

from megatron_apt import scripts

TOOLS = Path(__file__).parents[2] / "tools"


def test_every_script_ends_through_the_same_function():
    for file in [*TOOLS.glob("*.py"), *TOOLS.glob("benchmarks/*.py")]:
        text = file.read_text(encoding="utf-8")
        if "__main__" in text and file.name not in ("fuzz.py", "convert_checkpoint.py"):
            assert "scripts.run(" in text.partition('if __name__ == "__main__":')[2], file


ARGUMENTS = {
    "compare_runs": ["a", "b"],
    "crash_test": [],
    "show_schedule": ["a"],
    "benchmarks/checkpoint": [],
    "benchmarks/convert": [],
    "benchmarks/data_parallel": [],
    "benchmarks/step_time": [],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_file_for_results_is_looked_at_before_the_work(script, tmp_path, name):
    for place, said in {tmp_path: "is a folder", tmp_path / "none" / "x.json": "there is no folder"}.items():
        code, text = script(name, *ARGUMENTS[name], "--json", place)
        assert code == 2 and f"argument --json: {place}: {said}" in text


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("compare_runs", "--rtol", ("nan", "-1", "x", "inf")),
        ("show_schedule", "--discriminator", ("nan", "0", "1e300")),
        ("show_schedule", "--message", ("nan", "-1")),
        ("crash_test", "--kills", ("0", "-1", "1.5", "9" * 30)),
        ("crash_test", "--kills-per-run", ("0",)),
        ("benchmarks/checkpoint", "--saves", ("0", "x")),
        ("benchmarks/convert", "--gigabytes", ("nan", "0", "1e30")),
        ("benchmarks/data_parallel", "--steps", ("0",)),
        ("benchmarks/step_time", "--threads", ("0", "-1")),
    ],
)
def test_numbers_that_mean_nothing_are_named(script, name, option, values):
    for value in values:
        code, text = script(name, *ARGUMENTS[name], option, value)
        assert code == 2 and re.search(
            rf"argument {option}: '{value}' is not a (whole )?number between", text
        ), text


@pytest.mark.parametrize("name", ["compare_runs", "show_schedule"])
def test_files_that_are_not_there_or_of_another_kind_are_named(script, tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00" * 100)
    (tmp_path / "empty").touch()
    for place in ("none", "pipe", "folder", "bytes", "empty"):
        files = [tmp_path / place] * (2 if name == "compare_runs" else 1)
        code, text = script(name, *files)
        assert (
            code == 1 and text.startswith(f"{name}: ") and str(tmp_path / place) in text and "\n" not in text
        )


@pytest.mark.parametrize(
    "head",
    [
        "microbatches 1000000000 iterations 1 shared 0 split 1",
        "microbatches 1 iterations -1 shared 0 split 1",
        "x" * 10,
    ],
)
def test_action_lists_that_claim_what_they_do_not_hold_are_refused(script, tmp_path, head):
    (tmp_path / "a.txt").write_text(head + "\nrank 0\n")
    code, text = script("show_schedule", tmp_path / "a.txt")
    assert code == 1 and f"{tmp_path / 'a.txt'}: {head!r} does not begin an action list" in text


def test_other_errors_keep_their_traceback_and_ctrl_c_has_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tools/a_tool.py"])

    def raising(error):
        def main():
            raise error

        return main

    with pytest.raises(AttributeError, match="a fault"):
        scripts.run(raising(AttributeError("a fault")))
    for error, code in (
        (KeyboardInterrupt(), 130),
        (ValueError("x=1: wrong"), "a_tool: ValueError: x=1: wrong"),
    ):
        with pytest.raises(SystemExit) as ended:
            scripts.run(raising(error))
        assert ended.value.code == code
    assert capsys.readouterr().err == "a_tool: interrupted\n"
    for result in (None, 0, 3):
        with pytest.raises(SystemExit) as ended:
            scripts.run(lambda result=result: result)
        assert ended.value.code == result
