"""Estimate the GPU hours of scoring a study before it is submitted, from its model and its sets.

By hand: python scripts/estimate.py config/olmoe-1b-7b.yaml
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock

LOADING = 2 / 60
"""Hours that a job takes to start Python and load a model of several gigabytes."""


def main(clock: JobClock) -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("config", type=Path, help="study config (YAML)")
    parser.add_argument(
        "--teraflops", type=float, default=30,
        help="10^12 operations per second that a GPU achieves, not its peak (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, default=100, help="GPUs at once (default: %(default)s)")
    arguments = parser.parse_args()

    from moe_routing.config.study import load_config
    from moe_routing.evaluation.estimate import estimate, read_architecture

    clock.started()
    study = load_config(arguments.config)
    model = read_architecture(study.model)
    sets = estimate(study, model, arguments.teraflops)
    print(f"{model.active_parameters(model.top_k) / 1e9:.2f} billion active parameters")
    for one in sets:
        print(
            f"{one.dataset}: {one.cells} cells of {one.tokens / 1e6:.2f} million tokens, "
            f"{one.hours:.1f} GPU hours, the longest {60 * one.longest:.0f} minutes"
        )
    per_job = study.resources.strategies_per_job
    cells = sum(one.cells for one in sets)
    scoring = sum(one.hours for one in sets)
    hours = scoring + LOADING * cells / per_job
    longest = max(one.longest for one in sets) * per_job + LOADING
    wall = max(longest, hours / arguments.gpus)
    print(
        f"scoring: {hours:.1f} GPU hours at {arguments.teraflops:g} teraflops, loading included; "
        f"{wall:.1f} hours on {arguments.gpus} GPUs; calibration and analyses come on top"
    )


if __name__ == "__main__":
    run(main)
