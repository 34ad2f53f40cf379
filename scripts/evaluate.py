"""Score a cell: cells/<strategy>/<data set>.parquet and .json, or numerics/<arm>/<data set>.*.

A cell that an earlier job has scored is copied from the study's store. Otherwise other cells of
the data set are scored in passing, as many as the config's resources.strategies_per_job allows.

By hand: python scripts/evaluate.py --results results/default --cell cells/stock/wikipedia
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.evaluation.store import CELL_SUFFIXES, add_piece_arguments, deliver_finished
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, then copy the cell or score it."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument(
        "--cell", required=True, metavar="PART/NAME/DATASET", help="such as cells/stock/wikipedia"
    )
    add_piece_arguments(parser, "cell")
    arguments = parser.parse_args()
    results = arguments.results

    clock.started()
    asked = (arguments.cell, CELL_SUFFIXES, arguments.settings, arguments.inputs)
    if deliver_finished(results, *asked):
        return

    from moe_routing.config.cells import parse_cell
    from moe_routing.config.study import load_config
    from moe_routing.evaluation.cells import complete_cell

    clock.started()
    config = load_config(results / "config.yaml")
    complete_cell(config, results, parse_cell(config, arguments.cell))


if __name__ == "__main__":
    run(main)
