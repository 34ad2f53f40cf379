"""Draw the figures of the comparison: comparison/comparison_plots/*.png and *.svg.

By hand: python scripts/figures.py --results results/default
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, draw, write."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    from moe_routing.reporting.plots import write_plots
    from moe_routing.reporting.results import StudyResults

    clock.started()
    write_plots(StudyResults.load(results))


if __name__ == "__main__":
    run(main)
