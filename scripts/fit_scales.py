"""Fit the scale of the experts' output under a strategy that is compared at its best scale.

Other strategies of the study are fitted in passing, as many as resources.strategies_per_job allows.

By hand: python scripts/fit_scales.py --results results/default --strategy stock_scaled
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.evaluation.store import FITTED_SUFFIXES, add_piece_arguments, deliver_finished
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, then copy the scale or fit it."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument("--strategy", required=True, metavar="ID", help="such as stock_scaled")
    add_piece_arguments(parser, "scale")
    arguments = parser.parse_args()
    results = arguments.results

    clock.started()
    path = f"calibration/scales/{arguments.strategy}"
    if deliver_finished(results, path, FITTED_SUFFIXES, arguments.settings, arguments.inputs):
        return

    from moe_routing.evaluation.scales import scale_study

    clock.started()
    scale_study(results, arguments.strategy)


if __name__ == "__main__":
    run(main)
