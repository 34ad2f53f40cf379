"""Draw the figures of the comparison: comparison/comparison_plots/*.png and *.svg.

By hand: python scripts/figures.py --results results/default
The pictures of the README:
         python scripts/figures.py --results results/default --only budgets experts_by_layer
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, draw, write."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="small PNGs of these, for --out")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/figures"), help="where --only writes"
    )
    arguments = parser.parse_args()

    from moe_routing.reporting.plots import write_plots, write_small
    from moe_routing.reporting.results import StudyResults

    clock.started()
    study = StudyResults.load(arguments.results)
    if arguments.only:
        write_small(study, arguments.only, arguments.out)
    else:
        write_plots(study)


if __name__ == "__main__":
    run(main)
