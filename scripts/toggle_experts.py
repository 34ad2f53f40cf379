"""Toggle experts of calibration tokens in the stock model, and store what each changes.

By hand: python scripts/toggle_experts.py --results results/default
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, toggle, write."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    import numpy as np

    from moe_routing.evaluation.calibration_job import load_calibration_job
    from moe_routing.evaluation.toggles import toggle_experts
    from moe_routing.routing.calibration import OUTPUTS_FILE, TOGGLES_FILE
    from moe_routing.routing.outputs import ExpertOutputs

    clock.started()
    config, loaded, texts = load_calibration_job(results)
    toggles = toggle_experts(
        loaded.model,
        loaded.tokenizer,
        texts,
        ExpertOutputs.load(results / "calibration" / OUTPUTS_FILE),
        tokens=config.calibration.toggled_tokens,
        window=config.evaluation.window,
        rng=np.random.default_rng(config.seed),
    )
    toggles.save(results / "calibration" / TOGGLES_FILE)


if __name__ == "__main__":
    run(main)
