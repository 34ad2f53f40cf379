"""Whether a metric can show what routing costs: not where the baseline guesses."""

from __future__ import annotations

from collections.abc import Mapping

from moe_routing.statistics.estimate import Estimate
from moe_routing.vocabulary import DATASETS, METRICS


def at_chance(dataset: str, metric: str, low: float) -> bool:
    """Return whether an accuracy cannot be told from guessing.

    Args:
        dataset: evaluation set.
        metric: what was measured; only proportions can be at chance.
        low: lower limit of its interval.

    >>> at_chance("hellaswag", "accuracy", 0.24), at_chance("hellaswag", "accuracy", 0.30)
    (True, False)
    """
    chance = DATASETS[dataset].chance
    return METRICS[metric].is_proportion and (low <= chance if chance else low <= 0)


def chance_warnings(
    baseline: Mapping[str, Mapping[str, Estimate]], main: Mapping[str, str]
) -> list[str]:
    """Return a warning for each data set whose declared main metric is at chance.

    Args:
        baseline: estimates of the baseline, by data set and metric.
        main: main metric of each data set.

    >>> accuracy = Estimate("accuracy", 0.26, 0.22, 0.31, 400)
    >>> chance_warnings({"hellaswag": {"accuracy": accuracy}}, {"hellaswag": "accuracy"})[0][:60]
    "datasets.hellaswag.main_metric is 'accuracy', at which the b"
    """
    found = []
    for dataset, metric in main.items():
        one = baseline.get(dataset, {}).get(metric)
        if one is None or not at_chance(dataset, metric, one.low):
            continue
        found.append(
            f"datasets.{dataset}.main_metric is '{metric}', at which the baseline cannot be told "
            f"from guessing ({one.value:.3f}, interval from {one.low:.3f}; chance "
            f"{DATASETS[dataset].chance:g}): the set cannot show what routing costs by it"
        )
    return found
