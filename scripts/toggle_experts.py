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
    import pandas as pd

    from moe_routing.config.study import load_config
    from moe_routing.evaluation.study_model import load_study_model
    from moe_routing.evaluation.toggles import toggle_experts
    from moe_routing.routing.calibration import TOGGLES_FILE

    clock.started()
    config = load_config(results / "config.yaml")
    loaded = load_study_model(config.model, results, config.resources.threads)
    toggles = toggle_experts(
        loaded.model,
        loaded.tokenizer,
        list(pd.read_parquet(results / "data" / "calibration.parquet")["text"]),
        tokens=config.calibration.toggled_tokens,
        window=config.evaluation.window,
        rng=np.random.default_rng(config.seed),
    )
    toggles.save(results / "calibration" / TOGGLES_FILE)


if __name__ == "__main__":
    run(main)
