"""A planted study of rules at budgets: one better than a fixed number at equal cost, one equal, one
worse, on sets of which one shows the reverse and one tells nothing by accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from planted_items import with_gold
from planted_results import figures_as_dots, planted_config, write_results

from moe_routing.evaluation.collect import write_tables
from moe_routing.reporting.plots import write_plots
from moe_routing.reporting.results import StudyResults
from moe_routing.statistics.study_tables import write_statistics

# In nats, 4 experts for every token lose .10 and 4.5, between 4 and 8 (0), lose .0875. The
# thresholds use 4, the others 4.5. LAMBADA shows the reverse of the other sets. On HellaSwag only
# the likelihood moves: accuracy is at chance.
BETTER, EQUAL, WORSE = "absolute_k8_b3_consequence", "absolute_k8_b3", "topp_k8_b3"
FIXED = 0.0875
LOSS = {BETTER: 0.02, EQUAL: 0.10, WORSE: 0.20, "regular_k4": 0.10, "bh_k8_b4": 0.05,
        "mixture.bh_k8_b4": FIXED, "shuffle.bh_k8_b4": FIXED, "regular_k1": 0.30}  # fmt: skip


def write_budgets_study(folder: Path) -> StudyResults:
    """Write the study with tables, statistics and dots for figures, and read it."""
    config = planted_config(
        strategies=("stock", "regular_k4", "regular_k8"),
        study="budgets",
        controls=["regular_k1", "mixture.bh_k8_b4", "shuffle.bh_k8_b4"],
        budgets=["bh_k8_b4", BETTER, EQUAL, WORSE],
        main={"hellaswag": "gold_bits_per_byte", "lambada": "gold_bits_per_byte"},
        statistics={
            "primary": {"strategy": "bh_k8_b4", "against": "mixture", "dataset": "wikipedia"},
            "resamples": 999,
        },
    )
    write_results(folder, config, {name: -loss for name, loss in LOSS.items()}, items=400)
    rng = np.random.default_rng(0)
    for path in sorted((folder / "cells").glob("*/hellaswag.parquet")):
        items = pd.read_parquet(path)
        right = rng.random(len(items)) < 0.25
        items.assign(correct=right, correct_norm=right).to_parquet(path, index=False)
    stock = pd.read_parquet(folder / "cells" / "stock" / "lambada.parquet")["log_likelihood"]
    for path in sorted((folder / "cells").glob("*/lambada.parquet")):
        items = pd.read_parquet(path)
        turned = items.assign(log_likelihood=2 * stock - items["log_likelihood"])
        with_gold(turned).to_parquet(path, index=False)
    write_tables(config, folder)
    write_statistics(config, folder)
    found = StudyResults.load(folder)
    with figures_as_dots():
        write_plots(found)
    return found
