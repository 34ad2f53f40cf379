"""Check that a study samples enough calibration tokens for its nulls and the model's experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import cast

from moe_routing.config.analyses import FIT_TIMES
from moe_routing.config.limits import Limits
from moe_routing.config.study import StudyConfig
from moe_routing.errors import InputError
from moe_routing.routing.levels import min_draws
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.strategies.testing import BH, MultipleTesting
from moe_routing.vocabulary import NeededId

DRAWS_PER_TOKEN: Mapping[str, Callable[[Limits], float]] = MappingProxyType(
    {
        "within_token": lambda limits: limits.experts,
        "within_token_split": lambda limits: limits.experts,
        "within_token_efron": lambda limits: math.inf,
        "pooled": lambda limits: limits.experts,
        "pooled_kde": lambda limits: limits.experts,
        "per_expert": lambda limits: 1,
        "per_expert_kde": lambda limits: 1,
        "unselected": lambda limits: limits.experts - limits.top_k,
        "random_direction": lambda limits: math.inf,
        "permuted_context": lambda limits: 1,
        "needed": lambda limits: limits.experts,
    }
)
"""Draws that a calibration token adds to each tail of a fitted null; under ``needed`` a toggled
token counts for all its experts."""


def check_tokens(study: StudyConfig, limits: Limits, origin: str) -> None:
    """Check that every null in use gets enough draws for every level that it is tested at.

    Args:
        study: the config, with the defaults of the model filled in; it is within the limits.
        limits: those of the model.
        origin: how errors name the config file.

    Raises:
        InputError: too few tokens to calibrate, or to examine nulls.
    """
    for key, tokens, needed, what in _demands(study, limits):
        if tokens < needed:
            raise InputError(
                f"{origin}: {key} is {tokens}; allowed: at least {needed}, for {what} with the "
                f"model's {limits.experts} experts"
            )


def _demands(study: StudyConfig, limits: Limits) -> Iterator[tuple[str, int, int, str]]:
    """Yield a key, its tokens, how many are needed, and for what."""
    validity, tokens = study.analysis.validity, study.calibration.tokens
    for what, null, level in _levels(study, limits):
        if NeededId.parse(null):
            toggled = study.calibration.toggled_tokens
            yield "calibration.toggled_tokens", toggled, _needed("needed", level, limits), what
        else:
            yield "calibration.tokens", tokens, _needed(null, level, limits), what
    what = f"analysis.validity.level {validity.level:g} of null 'needed'"
    needed = _needed("needed", validity.level / limits.experts, limits)
    yield "analysis.held_out.dead_tokens", study.analysis.held_out.dead_tokens, needed, what
    for null in cast("list[str]", validity.nulls):  # filled in from the model
        what = f"analysis.validity.level {validity.level:g} of null '{null}'"
        needed = -(-_needed(null, validity.level / limits.experts, limits) // FIT_TIMES)
        yield "analysis.validity.tokens", validity.tokens, needed, what
        if null == "permuted_context":  # fitted and tested on parts of the calibration sample
            yield "calibration.tokens", tokens, needed * (FIT_TIMES + 1), what


def _levels(study: StudyConfig, limits: Limits) -> Iterator[tuple[str, str, float]]:
    """Yield each use of a null, the null, and the smallest level that it is tested at."""
    experts = limits.experts
    for name in study.scored:
        strategy = parse_strategy(name)
        rule = getattr(strategy, "base", strategy)
        if isinstance(rule, MultipleTesting) and rule.alpha is not None:
            yield f"strategy '{name}'", rule.null, rule.smallest_level(experts)
    arm = study.bh_arm(limits.top_k)
    yield f"held-out interventions under '{arm.id}'", arm.needs_null, arm.smallest_level(experts)
    for key, part in (("bh", study.analysis.bh), ("ablation", study.analysis.ablation)):
        for null in part.nulls or study.calibration.nulls:
            for alpha in part.alpha:
                rule = BH.against(null, max_k=experts, alpha=alpha)
                what = f"analysis.{key}.alpha {alpha:g} of null '{null}'"
                yield what, null, rule.smallest_level(experts)


def _needed(null: str, level: float, limits: Limits) -> int:
    """Return the fewest tokens that give a null p-values as small as a level."""
    return math.ceil(min_draws(level) / DRAWS_PER_TOKEN[null](limits))
