"""What each lever costs: strategies that differ in score, threshold, substitute and scale.

Each is compared with the stock model, and one whose output is scaled with the stock model at its
own best scale, so that no lever is credited with a change of scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_routing.config.study import StatisticsConfig
from moe_routing.routing.strategies import parse_strategy
from moe_routing.statistics.cells import Panel
from moe_routing.statistics.comparison import compare, named_rng
from moe_routing.statistics.contrasts import ResultRow
from moe_routing.statistics.lever_kinds import SCALED
from moe_routing.vocabulary import METRICS

LOSSES = {
    "perplexity": METRICS["nats_per_token"],
    "multiple_choice": METRICS["nats_per_token"],
    "last_word": METRICS["nats_per_target"],
}
"""The loss by task; of a multiple choice, that of the right one."""


def reference_of(strategy_id: str, baseline: str) -> str:
    """Return what a lever is compared with: the baseline, scaled if the lever is.

    The scaled baseline itself is compared with the baseline: what scale alone gains.

    >>> reference_of("regular_k3_norm_scaled", "stock"), reference_of("stock_scaled", "stock")
    ('stock_scaled', 'stock')
    """
    scaled = parse_strategy(baseline).model_copy(update={"scale": SCALED}).id
    is_scaled = parse_strategy(strategy_id).scale == SCALED
    return scaled if is_scaled and strategy_id != scaled else baseline


def lever_rows(
    panel: Panel,
    levers: Mapping[str, str],
    settings: StatisticsConfig,
    seed: int,
    experts: Mapping[str, float],
) -> list[ResultRow]:
    """Return one row per lever of a data set.

    Args:
        panel: its cells, references included.
        levers: the reference of each lever, by id; those without a cell of either are left out.
        settings: level of the intervals, and number of resamples.
        seed: seed of the study.
        experts: mean experts per token of each strategy.
    """
    place = {name: index for index, name in enumerate(panel.strategies)}
    found = {arm: ref for arm, ref in levers.items() if arm in place and ref in place}
    if not found:
        return []
    metric = LOSSES[panel.task]
    value_NS = panel.values(metric)
    arms, references = ([place[name] for name in names] for names in (found, found.values()))
    difference_NS = value_NS[:, arms] - value_NS[:, references]
    rng = named_rng(seed, "levers", panel.dataset, metric.name)
    comparison = compare(panel, metric, difference_NS, settings, rng)
    mean_S = value_NS.sum(0) / panel.units(metric).sum()
    rows = []
    for s, (arm, reference) in enumerate(found.items()):
        strategy = parse_strategy(arm)
        rows.append(
            {
                "strategy": arm,
                "dataset": panel.dataset,
                "metric": metric.name,
                "reference": reference,
                "score": strategy.score,
                "candidates": strategy.candidates,
                "dropped": strategy.dropped,
                "scale": strategy.scale,
                "mean_experts": experts.get(arm, np.nan),
                "value": mean_S[place[arm]],
                "reference_value": mean_S[place[reference]],
                "difference": float(comparison.boot.ratio_S[s]),
                "low": comparison.low_S[s],
                "high": comparison.high_S[s],
                "p_value": comparison.p_sign_flip_S[s],
                "n_items": panel.n_items,
                "n_clusters": panel.n_clusters,
            }
        )
    return rows
