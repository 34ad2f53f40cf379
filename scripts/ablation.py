"""What removing one selected expert does to the loss, or the figures of it.

By hand: python scripts/ablation.py --results results/default
         python scripts/ablation.py --results results/default --figures
"""

import argparse
from pathlib import Path

from moe_routing.cli import run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, then intervene and print the table, or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument("--figures", action="store_true", help="draw from the tables instead")
    arguments = parser.parse_args()

    if arguments.figures:
        from moe_routing.figures.ablation import draw_ablation

        clock.started()
        draw_ablation(arguments.results / "ablation")
        return

    from moe_routing.analysis.ablation import write_ablation
    from moe_routing.config.study import load_config

    clock.started()
    config = load_config(arguments.results / "config.yaml")
    table = write_ablation(config, arguments.results)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    run(main)
