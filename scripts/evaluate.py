"""Score one strategy on evaluation sets: cells/<strategy>/<dataset>.parquet and .json.

By hand: python scripts/evaluate.py --results results/default --strategy bh_k16_a005
"""

import argparse
from pathlib import Path

from moe_routing.cli import run


def main() -> None:
    """Parse arguments, load the model once, evaluate every set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument("--strategy", required=True, help="strategy id, such as regular_k8")
    parser.add_argument("--dataset", action="append", help="evaluation set (default: all)")
    arguments = parser.parse_args()

    from moe_routing.config import load_config
    from moe_routing.evaluation.cells import evaluate_strategy

    config = load_config(arguments.results / "config.yaml")
    evaluate_strategy(config, arguments.results, arguments.strategy, arguments.dataset)


if __name__ == "__main__":
    run(main)
