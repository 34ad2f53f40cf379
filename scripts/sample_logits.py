"""Sample the router logits of the stock model on calibration text.

By hand: python scripts/sample_logits.py --results results/default
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, sample, write."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    import numpy as np

    from moe_routing.evaluation.calibrate import sample_router_logits
    from moe_routing.evaluation.calibration_job import load_calibration_job
    from moe_routing.evaluation.windows import calibration_window
    from moe_routing.routing.calibration import SAMPLE_FILE

    clock.started()
    config, loaded, texts = load_calibration_job(results)
    sample = sample_router_logits(
        loaded.model,
        loaded.tokenizer,
        texts,
        tokens=config.calibration.tokens,
        window=calibration_window(loaded.model, config.evaluation.window),
        rng=np.random.default_rng(config.seed),
    )
    sample.save(results / "calibration" / SAMPLE_FILE)


if __name__ == "__main__":
    run(main)
