"""The strategies that the analyses run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from moe_routing.analysis.optional import present
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.routed import routed
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import Strategy
from moe_routing.routing.strategies.testing import BH
from moe_routing.routing.strategies.topk import Regular, Stock

if TYPE_CHECKING:
    from moe_routing.config.study import StudyConfig


def check_arms(loaded: LoadedModel, arms: Iterable[Strategy], calibration: Calibration) -> None:
    """Build the router of every strategy once, so that errors come before any text is scored.

    Raises:
        InputError: more experts than the model has, a calibration of another model, or too few
            calibration tokens for a level.
    """
    for strategy in arms:
        with routed(loaded.model, strategy, calibration=calibration):
            pass


def arms_of(config: StudyConfig, nulls: Sequence[str], rule: ModelRule) -> list[Strategy]:
    """Return the static arms, by k, then BH by null, max_k and alpha."""
    settings = config.analysis.bh
    baseline = config.parsed[config.statistics.baseline].resolved(rule)
    ks = {*present(settings.fewer_k), *present(settings.max_k)}
    # One curve has one kind of weights: those of the baseline, or else the model's.
    curve = type(baseline) if isinstance(baseline, Regular) else type(Stock().resolved(rule))
    static: dict[str, Strategy] = {arm.id: arm for arm in (curve(k=k) for k in sorted(ks))}
    static.setdefault(baseline.id, baseline)
    return [*static.values(), *(arm for null in nulls for arm in bh_arms(config, null))]


def bh_arms(config: StudyConfig, null: str) -> Iterator[BH]:
    """Yield the BH arms of one null."""
    for max_k in present(config.analysis.bh.max_k):
        for alpha in config.analysis.bh.alpha:
            yield BH.against(null, max_k=max_k, alpha=alpha)
