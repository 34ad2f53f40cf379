"""Write comparison/ROUTING_COMPARISON_REPORT.md from the tables of a study.

By hand: python scripts/comparison_report.py --results results/default
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, write the report."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    from moe_routing.reporting.comparison_report import write_report
    from moe_routing.reporting.results import StudyResults

    clock.started()
    write_report(StudyResults.load(results))


if __name__ == "__main__":
    run(main)
