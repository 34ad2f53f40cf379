"""Run one of the analyses of a study and print its main table, or draw its figures.

By hand: python scripts/analyse.py bh --results results/default
         python scripts/analyse.py bh --results results/default --figures
"""

import argparse
from importlib import import_module
from pathlib import Path

from moe_routing.analysis.outputs import ANALYSES
from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, then run the analysis and print its table, or draw its figures."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("analysis", choices=[analysis.name for analysis in ANALYSES])
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument(
        "--figures", action="store_true", help="draw figures from existing tables instead"
    )
    arguments = parser.parse_args()
    name, results = arguments.analysis, arguments.results

    # Imported here: drawing does not need torch, and each analysis needs only its own module.
    if arguments.figures:
        draw = getattr(import_module(f"moe_routing.figures.{name}"), f"draw_{name}")
        clock.started()
        draw(results / name)
        return

    from moe_routing.config.study import load_config

    write = getattr(import_module(f"moe_routing.analysis.{name}"), f"write_{name}")
    clock.started()
    table = write(load_config(results / "config.yaml"), results)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))


if __name__ == "__main__":
    run(main)
