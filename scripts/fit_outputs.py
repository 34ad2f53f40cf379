"""Measure the outputs of all experts on calibration text, and fit predictors of their norms.

By hand: python scripts/fit_outputs.py --results results/default
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, fit, write."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    from moe_routing.evaluation.calibration_job import load_calibration_job
    from moe_routing.evaluation.outputs import fit_expert_outputs
    from moe_routing.evaluation.windows import calibration_window
    from moe_routing.routing.calibration import OUTPUTS_FILE

    clock.started()
    config, loaded, texts = load_calibration_job(results)
    outputs = fit_expert_outputs(
        loaded.model,
        loaded.tokenizer,
        texts,
        tokens=config.calibration.tokens,
        window=calibration_window(loaded.model, config.evaluation.window),
    )
    outputs.save(results / "calibration" / OUTPUTS_FILE)


if __name__ == "__main__":
    run(main)
