"""The fuzz tool itself: its inputs are the same every time, and what a fault is it sees."""

import contextlib
import pickle
import random

import pytest
from fuzzing import BOUNDARIES
from fuzzing.boundary import Boundary, Done, Input, Outcome, Wrong, attempt, judged
from fuzzing.mutate import bytes_damage, json_damage
from fuzzing.planted import bombs, expressions, planted
from fuzzing.worker import Worker


def boundary(run) -> Boundary:
    return Boundary(
        "x",
        1,
        lambda valid: None,
        lambda rng, valid, folder: Input(f"{rng.random()}", canary=folder / "canary"),
        run,
    )


def test_the_same_numbers_give_the_same_damage():
    for make in (
        lambda rng: bytes_damage(rng, bytes(range(256)) * 9),
        lambda rng: json_damage(rng, {"a": [1, {"b": "c"}], "d": None}),
    ):
        first, again, other = ([make(random.Random(f"{seed} {i}")) for i in range(50)] for seed in (0, 0, 1))
        assert first == again and first != other


def test_what_is_judged(tmp_path):
    case = Input("x", names=("field",))
    assert judged(Done(0, "done"), case, tmp_path).kind == "fine"
    assert judged(Done(1, "megatron-apt: ValueError: field=3: use 4"), case, tmp_path).kind == "named"
    assert judged(Done(1, f"{tmp_path}/x: damaged; fetch it again"), case, tmp_path).kind == "named"
    for said in (
        "UnicodeDecodeError: 'utf-8' codec can't decode; use another",
        "field is bad",
        "field; " + "x" * 5000,
    ):
        assert judged(Done(1, said), case, tmp_path).kind == "unnamed"
    assert judged(Done(1, "field; Traceback (most recent call last)"), case, tmp_path).kind == "crash"


def test_faults_of_one_input(tmp_path):
    def raises(error):
        def run(case, valid, folder):
            raise error

        return run

    def runs_code(case, valid, folder):
        case.canary.touch()
        return Outcome("named", "refused, too late")

    kinds = {
        "crash": raises(KeyError("a")),
        "wrong": raises(Wrong("passed")),
        "memory": raises(MemoryError()),
        "ran": runs_code,
    }
    for kind, run in kinds.items():
        _, outcome = attempt(boundary(run), 0, 0, tmp_path, tmp_path / "scratch")
        assert outcome.kind == kind and not outcome.good


def test_planted_pickles_do_run_where_nobody_looks(tmp_path):
    """Canaries are worth something only if an unguarded unpickler sets them off."""
    canary, ran = tmp_path / "canary", 0
    for hostile in expressions(canary).values():
        canary.unlink(missing_ok=True)
        with contextlib.suppress(Exception):
            pickle.loads(b"\x80\x04" + hostile + b".")
        ran += canary.exists()
    assert ran > 30
    assert all(bombs().values()) and planted(random.Random(0), canary) == planted(random.Random(0), canary)


@pytest.mark.parametrize(("name", "kind"), [("sleeps", "hang"), ("dies", "died"), ("eats", "memory")])
def test_what_the_process_cannot_outlive(tmp_path, monkeypatch, name, kind):
    """The watch from outside; the process is given a boundary of this kind by a module of its own."""
    (tmp_path / "sitecustomize.py").write_text(_HARM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("fuzzing.worker._KILL_MIB", 1400)
    worker = Worker(tmp_path, seed=0, limit=2.0 if kind == "hang" else 30.0)
    try:
        result = worker.run(name, 0)
        assert (result.kind, result.what) == (kind, name) and not result.good
        assert worker.run("sound", 0).kind == "fine"  # in a new process
    finally:
        worker.stop()


_HARM = """
import os, sys, time, types

def harm(name):
    def run(case, valid, folder):
        from fuzzing.boundary import Outcome
        if name == "sleeps":
            time.sleep(100)
        if name == "dies":
            os.abort()
        if name == "eats":
            held = [b"x" * (512 << 20) for _ in range(3)]
        return Outcome("fine")
    return run

def prepare(valid):
    pass

class Fakes(dict):
    def __missing__(self, name):
        from fuzzing.boundary import Boundary, Input
        return Boundary(name, 1, prepare, lambda rng, valid, folder: Input(name), harm(name))

package = types.ModuleType("fuzzing")
places = [os.path.join(p, "fuzzing") for p in os.environ["PYTHONPATH"].split(os.pathsep)]
package.__path__ = [p for p in places if os.path.isdir(p)]
package.BOUNDARIES = Fakes()
sys.modules["fuzzing"] = package
"""


def test_every_boundary_has_its_share():
    assert len(BOUNDARIES) == 12 and all(one.share >= 4 for one in BOUNDARIES.values())


@pytest.mark.parametrize("options", [["--only", "videos"], ["--only", "nix:3"], ["--boundary", "videos,nix"]])
def test_inputs_that_are_not_there_are_named(options, monkeypatch, capsys):
    import fuzz

    monkeypatch.setattr("sys.argv", ["fuzz.py", *options])
    with pytest.raises(SystemExit):
        fuzz.main()
    said = capsys.readouterr().err
    assert "'nix' is unknown; use some of" in said or "is no input; give BOUNDARY:NUMBER" in said
