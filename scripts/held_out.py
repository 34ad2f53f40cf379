"""Toggle and remove experts on text that nothing was fitted on.

By hand: python scripts/held_out.py --results results/default --text lambada
         python scripts/held_out.py --results results/default --routed
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
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--text", help="toggle and remove experts of the stock model on this text: calibration, "
        "for documents that nothing was fitted on, or an evaluation set"
    )  # fmt: skip
    what.add_argument(
        "--routed", action="store_true", help="remove experts in the states of the BH routing"
    )
    what.add_argument(
        "--dead", action="store_true", help="toggle experts of the model with dead experts"
    )
    arguments = parser.parse_args()
    results = arguments.results

    from moe_routing.evaluation.held_out import (
        toggle_dead,
        toggle_held_out,
        toggle_routed_states,
    )

    clock.started()
    if arguments.text is not None:
        toggle_held_out(results, arguments.text)
    elif arguments.routed:
        toggle_routed_states(results)
    else:
        toggle_dead(results)


if __name__ == "__main__":
    run(main)
