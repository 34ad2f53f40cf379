"""Collect every cell into the tables of comparison/: strategies, controls, levers, all metrics.

By hand: python scripts/collect.py --results results/default
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, collect, write."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    from moe_routing.config.study import load_config
    from moe_routing.evaluation.collect import write_tables

    clock.started()
    write_tables(load_config(results / "config.yaml"), results)


if __name__ == "__main__":
    run(main)
