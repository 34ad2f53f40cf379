"""Statistics of the stock router on evaluation text and prompts, or the figures of them.

By hand: python scripts/baseline.py --results results/default
         python scripts/baseline.py --results results/default --figures
"""

import argparse
from pathlib import Path

from moe_routing.cli import run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, then watch the model and print the table, or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument("--figures", action="store_true", help="draw from the tables instead")
    arguments = parser.parse_args()

    if arguments.figures:
        from moe_routing.figures.baseline import draw_baseline

        clock.started()
        draw_baseline(arguments.results / "baseline")
        return

    from moe_routing.analysis.baseline import write_baseline
    from moe_routing.config.study import load_config

    clock.started()
    config = load_config(arguments.results / "config.yaml")
    table = write_baseline(config, arguments.results)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    run(main)
