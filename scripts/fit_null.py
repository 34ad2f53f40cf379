"""Fit a null on sampled router logits and, for a null needed, on toggled experts.

Other nulls of the study that need no other files are fitted in passing.

By hand: python scripts/fit_null.py --results results/default --null within_token
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.evaluation.store import NULL_SUFFIXES, add_piece_arguments, deliver_finished
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, then copy the null or fit it."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument("--null", required=True, metavar="ID", help="such as within_token")
    add_piece_arguments(parser, "null")
    arguments = parser.parse_args()
    results = arguments.results

    clock.started()
    path = f"calibration/nulls/{arguments.null}"
    if deliver_finished(results, path, NULL_SUFFIXES, arguments.settings, arguments.inputs):
        return

    from moe_routing.evaluation.null_job import fit_study_null

    clock.started()
    fit_study_null(results, arguments.null)


if __name__ == "__main__":
    run(main)
