"""Pack a finished study: all that statistics, figures and the article are made from.

By hand: python scripts/archive.py --results results/default --out results/default.tar.gz
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.evaluation.archive import write_archive
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments and pack."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument("--out", type=Path, required=True, help=".tar.gz file to write")
    arguments = parser.parse_args()
    clock.started()
    write_archive(arguments.results, arguments.out)


if __name__ == "__main__":
    run(main)
