"""Whether p-values are uniform under H0, and what procedures control, or the figures of it.

By hand: python scripts/validity.py --results results/default
         python scripts/validity.py --results results/default --figures
"""

import argparse
from pathlib import Path

from moe_routing.cli import run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, then examine nulls and print the verdicts, or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument("--figures", action="store_true", help="draw from the tables instead")
    arguments = parser.parse_args()

    if arguments.figures:
        from moe_routing.figures.validity import draw_validity

        clock.started()
        draw_validity(arguments.results / "validity")
        return

    from moe_routing.analysis.validity import write_validity
    from moe_routing.config.study import load_config

    clock.started()
    config = load_config(arguments.results / "config.yaml")
    table = write_validity(config, arguments.results)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    run(main)
