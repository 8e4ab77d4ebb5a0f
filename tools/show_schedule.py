"""Checks, prices and draws action lists, side by side.

    megatron-apt schedule --ranks 4 --microbatches 8 --dump a.txt
    python tools/show_schedule.py a.txt b.txt [--cost F=1,I=1.8,W=0.3] [--message 0.1] [--picture schedules.png] [--json FILE]

Each file is what `megatron-apt schedule --dump` writes. A list that could not run is refused, naming the action that is wrong.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from megatron_apt.config import RunConfig
from megatron_apt.methods import METHODS
from megatron_apt.pipeline.build import Built, priced
from megatron_apt.pipeline.check import check_program
from megatron_apt.pipeline.command import costs_of, figures, parse_cost, table
from megatron_apt.pipeline.draw import draw
from megatron_apt.pipeline.program import read


def shown(file: str, options) -> Built:
    phases = METHODS[options.method](RunConfig(method=options.method), None).phases
    program = read(Path(file).read_text(encoding="utf-8"), phases, costs_of(phases, parse_cost(options.cost), options.discriminator), options.message)
    check_program(program)
    return priced(program.graph, program.order, float("inf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--method", default="apt", choices=sorted(METHODS))
    parser.add_argument("--cost", default="F=1,I=1,W=1", help="time of a rank's part of a network")
    parser.add_argument("--discriminator", type=float, default=1.0, help="cost of the discriminator as a multiple of the generator's")
    parser.add_argument("--message", type=float, default=0.0)
    parser.add_argument("--picture", default="", help="PNG or SVG file")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    try:
        found = {file: shown(file, options) for file in options.files}
    except (ValueError, OSError) as error:
        raise SystemExit(f"show_schedule: {error}") from error
    Console().print(table(f"{options.method}, {options.cost}", "action lists", found))
    if options.json:
        Path(options.json).write_text(json.dumps(figures(found), indent=1), encoding="utf-8")
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
