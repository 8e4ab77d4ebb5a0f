"""Damaged and hostile checkpoints: with their list of checksums as it was, which must
show any damage, and with one that fits the damage.
"""

import hashlib
import json
import random
import shutil
import zipfile
from pathlib import Path

from fuzzing.boundary import Boundary, Input, Outcome, Wrong, command, judged, worst
from fuzzing.datasets import recipe, replace, warm_run, write_run
from fuzzing.mutate import bytes_damage, json_damage
from fuzzing.planted import planted

_SUMS, _SEAL, _INDEX = "checksums.json", "commit.json", "index.json"
_TRAIN = ("--iterations", 3, "--save-every", 1, "--retention.last", 0)


def commits(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("iteration-*"))


def sign(commit: Path, older: bool = False) -> None:
    """Makes checksums fit the files, and the seal fit the checksums, as an attacker would.

    Args:
        older: as commits were before they had an index and a seal of ours, whose pickled
            index is what counts.
    """
    if older:
        for name in (_INDEX, _SEAL):
            (commit / name).unlink(missing_ok=True)
    files = sorted(path for path in commit.rglob("*") if path.is_file() and path.name not in (_SUMS, _SEAL))
    (commit / _SUMS).write_text(
        json.dumps({str(f.relative_to(commit)): _sum(f) for f in files}, indent=1, sort_keys=True),
        encoding="utf-8",
    )
    if not older:
        (commit / _SEAL).write_text(
            json.dumps({"checksums": _sum(commit / _SUMS)}, indent=1, sort_keys=True), encoding="utf-8"
        )


def _sum(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


# --- damage


def _make(rng: random.Random, valid: Path, folder: Path) -> Input:
    run = folder / "run"
    shutil.copytree(valid / "run", run, symlinks=True)
    commit = commits(run)[-1]
    how = rng.random()
    if how < 0.2:
        return _plant(rng, commit, folder)
    if how < 0.4:
        return _structure(rng, run, commit)
    return _damage(rng, commit)


def _plant(rng: random.Random, commit: Path, folder: Path) -> Input:
    """A hostile pickle where a file of the commit was, with checksums that fit."""
    canary = folder / "canary"
    file = rng.choice(
        (
            commit / ".metadata",
            commit / ".metadata",
            commit / "common.pt",
            next(iter(sorted(commit.glob("*.distcp")))),
        )
    )
    if not file.exists():
        file = commit / rng.choice((".metadata", "common.pt"))
    around = file.read_bytes() if file.name == ".metadata" and file.exists() else None
    data, what = planted(rng, canary, around)
    if file.suffix == ".distcp":
        content = file.read_bytes()
        file.write_bytes(data + content[len(data) :])
    elif file.name == "common.pt" and rng.random() < 0.6:
        what = f"{what} in a zip"
        with zipfile.ZipFile(file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
    else:
        file.write_bytes(data)
    older = rng.random() < 0.6
    sign(commit, older)
    return Input(
        f"{file.name} planted: {what}{', older' if older else ''}",
        (file.name, str(commit)),
        canary=canary,
        settings={"signed": True},
    )


def _structure(rng: random.Random, run: Path, commit: Path) -> Input:
    """`latest`, folders and files that are not what they were."""
    earlier, latest = commits(run)[0], run / "checkpoints" / "latest"
    made = {
        "latest is missing": lambda: latest.unlink(),
        "latest is empty": lambda: latest.write_bytes(b""),
        "latest is a folder": lambda: replace(latest, "a folder"),
        "latest is a dangling link": lambda: replace(latest, "a dangling link"),
        "latest is a pipe": lambda: replace(latest, "a pipe"),
        "latest is /dev/zero": lambda: replace(latest, "/dev/zero"),
        "latest is random": lambda: latest.write_bytes(rng.randbytes(100)),
        "latest names /etc": lambda: latest.write_text("/etc"),
        "latest names what is not there": lambda: latest.write_text("iteration-00000099"),
        "latest has a NUL": lambda: latest.write_bytes(b"iteration\0"),
        "latest is long": lambda: latest.write_text("x" * 100_000),
        "latest names ..": lambda: latest.write_text("../.."),
        "state.json of the other commit": lambda: shutil.copy(earlier / "state.json", commit / "state.json"),
        "checksums.json of the other commit": lambda: shutil.copy(earlier / _SUMS, commit / _SUMS),
        "checksums.json holds nothing": lambda: (commit / _SUMS).write_text("{}"),
        "checksums.json leaves out the tensors": lambda: _leave_out(commit),
        "a file that is not listed": lambda: (commit / "extra.distcp").write_bytes(b"x"),
        "a folder that is not listed": lambda: (commit / "extra").mkdir(),
        "the newest commit is gone": lambda: shutil.rmtree(commit),
        "a half-written commit": lambda: (run / "checkpoints" / ".iteration-00000009.tmp").mkdir(),
        "a vast commit": lambda: (run / "checkpoints" / "iteration-99999999999999999999").mkdir(),
        "iteration-x": lambda: (run / "checkpoints" / "iteration-x").mkdir(),
        "checkpoints is a file": lambda: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()),
    }
    for name in (
        ".metadata",
        "common.pt",
        "metadata.json",
        "state.json",
        _SUMS,
        _SEAL,
        _INDEX,
        next(iter(commit.glob("*.distcp"))).name,
    ):
        for kind in ("missing", "empty", "a folder", "a pipe", "/dev/zero", "a dangling link"):
            if (commit / name).exists():
                made[f"{name} is {kind}"] = lambda name=name, kind=kind: replace(commit / name, kind)
    what = rng.choice(list(made))
    made[what]()
    unseen = what.startswith(
        ("latest", "the newest", "a half", "a vast", "iteration-x", "checkpoints", "a folder that")
    )
    return Input(
        what, (what.split()[0], "checkpoints", str(commit)), must_see=not unseen, settings={"structure": True}
    )


def _leave_out(commit: Path) -> None:
    sums = json.loads((commit / _SUMS).read_text())
    (commit / _SUMS).write_text(
        json.dumps(
            {name: entry for name, entry in sums.items() if not name.endswith((".distcp", ".metadata"))}
        )
    )
    file = next(iter(commit.glob("*.distcp")))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _damage(rng: random.Random, commit: Path) -> Input:
    """One file of the commit damaged, and signed again or not."""
    files = sorted(path for path in commit.iterdir() if path.is_file())
    jsons = [path for path in files if path.suffix == ".json"]
    file = rng.choice(files if rng.random() < 0.4 else jsons)
    before, name = file.read_bytes(), ""
    if file.suffix == ".json" and rng.random() < 0.9:
        data, what, name = json_damage(rng, json.loads(before))
    elif file.name == "common.pt" and rng.random() < 0.2:
        data, what = _zip_bomb(file), "a zip that unpacks to 300 MB"
    else:
        data, what = bytes_damage(rng, before)
    file.write_bytes(data)
    signed, older = file.name not in (_SUMS, _SEAL) and rng.random() < 0.65, rng.random() < 0.4
    if signed:
        sign(commit, older)
    names = tuple(filter(None, (file.name, name, str(commit), "BadLoss", "BadGradient")))
    return Input(
        f"{file.name}: {what}{', signed' if signed else ''}{', older' if signed and older else ''}",
        names,
        must_see=not signed and data != before,
        settings={"signed": signed},
    )


def _zip_bomb(file: Path) -> bytes:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02]." + bytes(300 << 20))
        archive.writestr("archive/version", "3\n")
    return file.read_bytes()


# --- what is done with it


def _run(case: Input, valid: Path, folder: Path) -> Outcome:
    """inspect and verify, then one of the commands that load."""
    run, rng = folder / "run", random.Random(case.what)
    whole = {path.name for path in commits(run)}
    inspected = judged(command("checkpoint", "inspect", run), case, run)
    verified = command("checkpoint", "verify", run)
    outcomes = [inspected, judged(verified, case, run, remedy=False)]  # a list of files
    if case.must_see and verified.code == 0:
        raise Wrong(f"verify: {verified.said[:300]}")
    load = rng.choice((_sample, _resume, _resume, _start_from, _reshard))
    loaded = load(run, valid, folder)
    # Of weights that somebody signed
    outcomes.append(judged(loaded, case, run, remedy="BadLoss" not in loaded.said))
    if case.must_see and loaded.code == 0:
        raise Wrong(f"{load.__name__} loaded it: {loaded.said[:300]}")
    if lost := whole - {path.name for path in commits(run)}:
        raise Wrong(f"{load.__name__} removed {sorted(lost)}")
    _check_log(valid / "run" / "log.jsonl", run / "log.jsonl")
    return worst(outcomes)


def _check_log(before: Path, after: Path) -> None:
    rows = [json.loads(line)["iteration"] for line in after.read_text().splitlines()]
    if 1 not in rows:
        raise Wrong(f"log.jsonl had iterations 1 and 2, now {rows}")
    if before.read_text().splitlines()[0] != after.read_text().splitlines()[0]:
        raise Wrong("log.jsonl was begun anew")


def _sample(run: Path, valid: Path, folder: Path):
    return command(
        "sample", run, "--prompts", "picture 1", "--out", folder / "samples", "--dataset", valid / "data"
    )


def _resume(run: Path, valid: Path, folder: Path):
    return command("train", recipe(folder / "recipe.py", valid / "data", run), *_TRAIN)


def _start_from(run: Path, valid: Path, folder: Path):
    return command(
        "train", recipe(folder / "recipe.py", valid / "data", folder / "other"), "--init.generator", run
    )


def _reshard(run: Path, valid: Path, folder: Path):
    return command("checkpoint", "reshard", run, folder / "copy")


CHECKPOINTS = Boundary("checkpoints", 20, write_run, _make, _run, warm_run)
