"""The console command ``moe-routing``: one subcommand for each question."""

from __future__ import annotations

import argparse
from typing import NoReturn

from moe_routing.cli import run
from moe_routing.commands import calibrate, compare, inspect, new_study
from moe_routing.usage import JobClock

COMMANDS = (compare, calibrate, inspect, new_study)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command; each subcommand adds its own."""
    parser = argparse.ArgumentParser(
        prog="moe-routing",
        description="Route a mixture-of-experts model by another rule, and measure the effect.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main() -> NoReturn:
    """Parse the command line and run the subcommand; bad input is one line."""
    arguments = make_parser().parse_args()

    def job(clock: JobClock) -> None:
        clock.started()
        arguments.run(arguments)

    run(job)


if __name__ == "__main__":
    main()
