"""Certify strategies: the fewest experts whose expected damage is at most the margin.

By hand: python scripts/certify.py --results results/default --strategy certified_k8_m001
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, certify, write and print the certificates."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument("--strategy", required=True, nargs="+", help="ids of certified strategies")
    arguments = parser.parse_args()
    results = arguments.results

    from moe_routing.evaluation.certify import certify_study

    clock.started()
    for certificate in certify_study(results, arguments.strategy):
        print(certificate)


if __name__ == "__main__":
    run(main)
