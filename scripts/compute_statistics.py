"""Compute statistics/*.csv of a study from its cells and the table of cells.

By hand: python scripts/compute_statistics.py --results results/default
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, compute, write."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    from moe_routing.config.study import load_config
    from moe_routing.statistics.study_tables import write_statistics

    clock.started()
    write_statistics(load_config(results / "config.yaml"), results)


if __name__ == "__main__":
    run(main)
