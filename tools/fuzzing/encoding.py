"""Running `encode` over a folder of one whole picture and one or more damaged inputs, and
what must hold afterwards.
"""

import json
from pathlib import Path

from fuzzing.boundary import Done, Input, Outcome, Wrong, command, judged
from fuzzing.media import SIZE, write_picture

CONTROL = "whole and sound"  # caption of the picture that nothing may disturb


def write_tokenizer(file: Path) -> None:
    from megatron_apt.encoders.text import train_sentencepiece

    train_sentencepiece([CONTROL, "a damaged file, of some kind"], file, vocab_size=512)


def write_control(folder: Path) -> None:
    write_picture(folder / "control.png", 99)
    (folder / "control.txt").write_text(CONTROL, encoding="utf-8")


def encode(source: Path, output: Path, valid: Path, *more: object) -> Done:
    options = (
        "--height",
        SIZE // 2,
        "--width",
        SIZE // 2,
        "--tokenizer",
        valid / "tokenizer.model",
        "--max-rejected",
        1.0,
        "--text-width",
        8,
    )
    return command("encode", "--source", source, "--output", output, *options, *more)


def outcome(
    done: Done, case: Input, folder: Path, output: Path, inputs: int | None, control: bool = True
) -> Outcome:
    """Of an encoding of so many inputs (None: not known).

    Args:
        control: the whole picture was among them.

    Raises:
        Wrong: an input left no trace, or the whole picture was lost.
    """
    if done.code != 0:
        if control:
            raise Wrong(f"one bad input ended the run: {done.said[:600]}")
        return judged(done, case, folder)
    rejected = [
        json.loads(line) for line in (output / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    samples = [
        json.loads(line) for line in (output / "index.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    if control and CONTROL not in [sample["caption"] for sample in samples]:
        raise Wrong(f"the whole picture did not become a sample; rejected: {str(rejected)[:400]}")
    if inputs is not None and len(samples) + len(rejected) != inputs:
        raise Wrong(
            f"{inputs} inputs became {len(samples)} samples and {len(rejected)} rejected: "
            f"{str(rejected)[:400]}"
        )
    for line in rejected:
        if (
            not {"file", "field", "value", "remedy"} <= line.keys()
            or len(json.dumps(line)) > 20_000
            or not line["remedy"]
        ):
            return Outcome(
                "unnamed",
                f"a line of rejected.jsonl of {len(json.dumps(line))} characters: {str(line)[:400]}",
            )
    if case.must_see and not rejected:
        raise Wrong("became a sample though it is damaged")
    shown = "; ".join(
        "{field}={value}: {remedy}".format(**{**line, "value": str(line["value"])[:80]}) for line in rejected
    )
    return Outcome("skipped", shown[:600]) if rejected else Outcome("fine", done.said[:200])
