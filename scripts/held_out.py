"""Toggle and remove experts on text that nothing was fitted on.

By hand: python scripts/held_out.py --results results/default
         python scripts/held_out.py --results results/default --dead
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, intervene, write."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument(
        "--dead",
        action="store_true",
        help="toggle experts of the model with dead experts; without it, toggle and remove experts "
        "of the stock model on every text, and remove experts in the states of BH routing",
    )
    arguments = parser.parse_args()

    from moe_routing.evaluation.held_out import (
        Job,
        toggle_dead,
        toggle_held_out,
        toggle_routed_states,
    )

    clock.started()
    job = Job.load(arguments.results)
    if arguments.dead:
        toggle_dead(job)
        return
    for text in job.config.held_out_texts:
        toggle_held_out(job, text)
    toggle_routed_states(job)


if __name__ == "__main__":
    run(main)
