"""Checks of a study's settings against the size of its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_routing.config.study import StudyConfig
from moe_routing.errors import InputError
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy


@dataclass(frozen=True)
class Limits:
    """Properties of a model that limit the settings of a study.

    Attributes:
        experts: number of experts per layer.
        rule: the model's own routing rule.
        window: maximum number of input tokens in a forward pass.
    """

    experts: int
    rule: ModelRule
    window: int

    @property
    def top_k(self) -> int:
        """Experts per token that the model was trained with."""
        return self.rule.top_k

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Limits:
        """Read the limits from a description of the model, as in ``model.json``."""
        return cls(described["num_experts"], ModelRule.of(described), described["window"])


def check_limits(study: StudyConfig, limits: Limits, origin: str) -> None:
    """Check every setting that the model may be too small for, before any job runs.

    Args:
        study: the config.
        limits: the limits of the model.
        origin: name of the config file in error messages.

    Raises:
        InputError: a setting needs more experts than the model has, the window is longer than the
            model's, a null needs rejected experts and the model rejects none, or the strategy of
            the primary contrast is the baseline's routing under another id.
    """
    stated = study.statistics.baseline
    study = study.of_model(limits.experts, limits.rule)
    window = study.evaluation.window
    if window is not None and window > limits.window:
        raise InputError(
            f"{origin}: evaluation.window is {window}; allowed: at most the model's {limits.window}"
        )
    for key, nulls in (
        ("calibration.nulls", study.calibration.nulls),
        ("analysis.validity.nulls", study.analysis.validity.nulls),
    ):
        if "unselected" in (nulls or ()) and limits.top_k == limits.experts:
            raise InputError(
                f"{origin}: {key} has 'unselected'; allowed: nulls that need no rejected experts, "
                f"since the model selects all its {limits.experts}"
            )
    baseline, primary = study.statistics.baseline, study.statistics.primary.strategy
    if primary != stated and parse_strategy(primary).resolved(limits.rule).id == baseline:
        raise InputError(
            f"{origin}: statistics.primary.strategy is '{primary}', which is the same routing as "
            f"the baseline '{stated}' on this model; allowed: another routing"
        )
    for setting, value in _numbers_of_experts(study, limits.rule):
        if value > limits.experts:
            raise InputError(
                f"{origin}: {setting}; allowed: at most the model's {limits.experts} experts"
            )


def _numbers_of_experts(study: StudyConfig, rule: ModelRule) -> Iterator[tuple[str, int]]:
    """Yield a description of each setting and the number of experts it needs."""
    for key in ("strategies", "controls", "levers", "budgets"):
        for name in getattr(study, key):
            most = parse_strategy(name).resolved(rule).max_experts
            yield f"{key} has '{name}', which may select {most}", most
    lists = {
        "bh.max_k": study.analysis.bh.max_k,
        "bh.fewer_k": study.analysis.bh.fewer_k,
        "validity.signals": study.analysis.validity.signals,
    }
    for key, values in lists.items():
        yield from ((f"analysis.{key} has {value}", value) for value in values or ())
    cap = study.analysis.validity.max_k
    if cap is not None:
        yield f"analysis.validity.max_k is {cap}", cap
    dead = study.analysis.held_out.dead_experts
    if dead is not None:
        yield f"analysis.held_out.dead_experts is {dead}", dead
