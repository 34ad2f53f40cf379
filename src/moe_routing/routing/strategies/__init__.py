"""Routing strategies and their ids."""

from __future__ import annotations

import difflib
import re

from moe_routing.errors import InputError
from moe_routing.routing.strategies.adaptive import Adaptive
from moe_routing.routing.strategies.base import Router, Selector, Strategy, decode
from moe_routing.routing.strategies.testing import BH, BY, EBH, HigherCriticism, Storey, Threshold
from moe_routing.routing.strategies.topk import Normalized, Regular, Uniform
from moe_routing.schema import parse

FAMILIES: tuple[type[Strategy], ...] = (
    Regular,
    Normalized,
    Uniform,
    Adaptive,
    BH,
    BY,
    EBH,
    Storey,
    HigherCriticism,
    Threshold,
)

__all__ = ["FAMILIES", "Router", "Selector", "Strategy", "parse_strategy"]


def parse_strategy(strategy_id: str) -> Strategy:
    """Return the strategy with this id.

    Raises:
        InputError: unknown family or parameter, or a value out of range.
    """
    family, *tokens = strategy_id.split("_")
    known = {cls.family: cls for cls in FAMILIES}
    if family not in known:
        close = difflib.get_close_matches(family, known, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise InputError(f"unknown strategy '{strategy_id}'{hint} families: {', '.join(known)}")
    cls = known[family]
    values = dict(_parse_token(token, cls, strategy_id) for token in tokens)
    return parse(cls, values, f"strategy '{strategy_id}'")


def _parse_token(token: str, cls: type[Strategy], strategy_id: str) -> tuple[str, object]:
    by_code = {code: name for name, code in cls.codes.items()}
    match = re.fullmatch(r"([a-z]+)(\d+)", token)
    if match and match[1] in by_code:
        name = by_code[match[1]]
        return name, decode(match[2], fraction=cls.model_fields[name].annotation is float)
    word = token.replace("-", "_")
    for name in cls.words:
        if word in cls.choices(name):
            return name, word
    allowed = [f"{code}<number>" for code in by_code]
    allowed += [choice.replace("_", "-") for name in cls.words for choice in cls.choices(name)]
    raise InputError(
        f"strategy '{strategy_id}': unknown part '{token}'; allowed: {', '.join(allowed)}"
    )
