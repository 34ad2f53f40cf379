"""Score strategies on evaluation sets: cells/<strategy>/<dataset>.parquet and .json.

By hand: python scripts/evaluate.py --results results/default --strategy bh_k16_a005 stock
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, load the model once, evaluate every strategy on every set."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument(
        "--strategy",
        required=True,
        nargs="+",
        metavar="ID",
        help="strategy ids, such as regular_k4",
    )
    parser.add_argument(
        "--dataset", nargs="+", metavar="NAME", help="evaluation sets (default: all)"
    )
    arguments = parser.parse_args()

    from moe_routing.config.study import load_config
    from moe_routing.evaluation.cells import evaluate_strategies

    clock.started()
    config = load_config(arguments.results / "config.yaml")
    evaluate_strategies(config, arguments.results, arguments.strategy, arguments.dataset)


if __name__ == "__main__":
    run(main)
