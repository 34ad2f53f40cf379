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
    import pandas as pd

    from moe_routing.config.study import load_config
    from moe_routing.evaluation.calibrate import calibration_window, sample_router_logits
    from moe_routing.evaluation.study_model import load_study_model
    from moe_routing.routing.calibration import SAMPLE_FILE

    clock.started()
    config = load_config(results / "config.yaml")
    loaded = load_study_model(config.model, results, config.resources.threads)
    sample = sample_router_logits(
        loaded.model,
        loaded.tokenizer,
        pd.read_parquet(results / "data" / "calibration.parquet")["text"],
        tokens=config.calibration.tokens,
        window=calibration_window(loaded.model, config.evaluation.window),
        rng=np.random.default_rng(config.seed),
    )
    sample.save(results / "calibration" / SAMPLE_FILE)


if __name__ == "__main__":
    run(main)
