"""Fit one null on sampled router logits and, for the null needed, on toggled experts.

By hand: python scripts/fit_null.py --sample results/default/calibration/router_logits.safetensors \
    --null within_token --out within_token.safetensors --diagnostics within_token.csv
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, fit, write the null and its diagnostics."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--sample", type=Path, required=True, help="sampled router logits")
    parser.add_argument("--null", required=True, help="null id, such as within_token")
    parser.add_argument("--toggles", type=Path, help="toggled experts, for a null needed")
    parser.add_argument("--outputs", type=Path, help="outputs of experts, for a null needed")
    parser.add_argument(
        "--epsilon", type=float, help="epsilon of a null needed without its own, in nats"
    )
    parser.add_argument("--out", type=Path, required=True, help="fitted null (.safetensors)")
    parser.add_argument("--diagnostics", type=Path, required=True, help="table by layer (.csv)")
    arguments = parser.parse_args()

    from moe_routing.files import atomic_path
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.nulls import diagnose, fit_null, save_null
    from moe_routing.routing.outputs import ExpertOutputs
    from moe_routing.routing.sample import CalibrationSample
    from moe_routing.routing.toggles import Toggles

    clock.started()
    sample = CalibrationSample.load(arguments.sample)
    toggles = arguments.toggles and Toggles.load(arguments.toggles)
    outputs = arguments.outputs and ExpertOutputs.load(arguments.outputs)
    null = fit_null(arguments.null, sample, toggles, arguments.epsilon, outputs)
    with atomic_path(arguments.diagnostics) as temporary:
        table = diagnose(null, Calibration(sample, {}, toggles, outputs))
        table.to_csv(temporary, index=False)
    save_null(null, sample, arguments.out, toggles)


if __name__ == "__main__":
    run(main)
