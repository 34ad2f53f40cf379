"""Fit the scale of the experts' output under strategies that are compared at their best scale.

By hand: python scripts/fit_scales.py --results results/default
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, fit, write and print the scales."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    from moe_routing.evaluation.scales import scale_study

    clock.started()
    for name, scale in scale_study(results).items():
        print(f"{name}: {scale:.3f}")


if __name__ == "__main__":
    run(main)
