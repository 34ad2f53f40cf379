"""Time a fixed text under every strategy, and count the experts that batches of tokens need.

Writes efficiency/timing.csv and efficiency/unique_experts.csv in the results folder.

By hand: python scripts/efficiency.py --results results/default
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    from moe_routing.evaluation.efficiency import measure_efficiency

    clock.started()
    measure_efficiency(results)


if __name__ == "__main__":
    run(main)
