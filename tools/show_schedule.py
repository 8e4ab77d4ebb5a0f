"""Checks, prices and draws action lists, side by side.

    megatron-apt schedule --ranks 4 --microbatches 8 --dump a.txt
    python tools/show_schedule.py a.txt b.txt [--cost F=1,I=1.8,W=0.3] [--message 0.1]
        [--picture schedules.png] [--json FILE]

Each file is what `megatron-apt schedule --dump` writes. A list that could not run is
refused, naming the action that is wrong.
"""

import argparse
import json
from pathlib import Path
from typing import get_args

from rich.console import Console

from megatron_apt import scripts
from megatron_apt.config import RunConfig
from megatron_apt.methods.build import build_method
from megatron_apt.methods.registry import DEFAULT, MethodName
from megatron_apt.plan.schedule import costs_of, figures, parse_cost, table
from megatron_apt.schedule.build import Built, priced
from megatron_apt.schedule.check import check_program
from megatron_apt.schedule.draw import draw
from megatron_apt.schedule.program import read
from megatron_apt.schema import read_bytes

REMEDY = "give a file that `megatron-apt schedule --dump` has written"


def shown(file: str, options) -> Built:
    phases = build_method(RunConfig(method=options.method), None).phases
    costs = costs_of(phases, parse_cost(options.cost), options.discriminator)
    data = read_bytes(file, remedy=REMEDY)
    try:
        program = read(data.decode("utf-8"), phases, costs, options.message)
        check_program(program)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {REMEDY}") from None
    return priced(program.graph, program.order, float("inf"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+")
    parser.add_argument("--method", default=DEFAULT, choices=sorted(get_args(MethodName)))
    parser.add_argument("--cost", default="F=1,I=1,W=1", help="time of a rank's part of a network")
    parser.add_argument(
        "--discriminator",
        type=scripts.number(1e-6, 1e6),
        default=1.0,
        help="cost of the discriminator as a multiple of the generator's",
    )
    parser.add_argument("--message", type=scripts.number(0), default=0.0)
    parser.add_argument("--picture", default="", type=scripts.output_file, help="PNG or SVG file")
    parser.add_argument("--json", default="", type=scripts.output_file)
    options = parser.parse_args()
    found = {file: shown(file, options) for file in options.files}
    Console().print(table(f"{options.method}, {options.cost}", "action lists", found))
    if options.json:
        Path(options.json).write_text(json.dumps(figures(found), indent=1), encoding="utf-8")
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    scripts.run(main)
