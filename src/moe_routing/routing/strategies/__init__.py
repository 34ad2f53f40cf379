"""Routing strategies and their ids.

A family of strategies is a class in a module of this folder, or in another package that registers
it as an entry point::

    [project.entry-points."moe_routing.strategies"]
    everyother = "my_package.everyother:EveryOther"

The class holds the entry of its family (:class:`moe_routing.vocabulary.Family`). This makes the ids
of the family valid in configs, and gives its names and its look in tables, figures and text.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping

from moe_routing.errors import InputError, check_type
from moe_routing.routing.strategies.base import Strategy, decode
from moe_routing.routing.strategies.controls import ControlStrategy
from moe_routing.routing.strategies.discovery import (
    control_kinds,
    controls,
    families,
    family_entry,
    static_families,
)
from moe_routing.routing.strategies.ranked import Budgeted, Ranked
from moe_routing.schema import build

__all__ = [
    "Budgeted",
    "ControlStrategy",
    "Ranked",
    "Strategy",
    "control_kinds",
    "controls",
    "families",
    "family_entry",
    "parse_strategy",
    "static_families",
]


def parse_strategy(strategy_id: str | Strategy) -> Strategy:
    """Return the strategy with this id, such as ``bh_k16_a005`` or ``shuffle.bh_k16_a005``.

    A strategy is returned as it is.

    Raises:
        InputError: unknown family or parameter, a value out of range, or no text.
    """
    if isinstance(strategy_id, Strategy):
        return strategy_id
    check_type("a strategy", strategy_id, str)
    return _parsed(strategy_id)


@functools.lru_cache(maxsize=1024)
def _parsed(strategy_id: str) -> Strategy:
    head, dot, base_id = strategy_id.partition(".")
    known, kind = (controls(), "controls (before the dot)") if dot else (families(), "families")
    cls = _family(head.split("_")[0], known, kind, strategy_id)
    values = _parameters(head, cls, strategy_id)
    if dot:
        values["base"] = _base(base_id, strategy_id)
    return build(cls, values, f"strategy '{strategy_id}'")


def _family(
    name: str, known: Mapping[str, type[Strategy]], kind: str, strategy_id: str
) -> type[Strategy]:
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise InputError(f"unknown strategy '{strategy_id}'{hint}; allowed {kind}: {', '.join(known)}")


def _base(base_id: str, strategy_id: str) -> Ranked:
    base = parse_strategy(base_id)
    if not isinstance(base, Ranked):
        allowed = ", ".join(name for name, cls in families().items() if issubclass(cls, Ranked))
        raise InputError(
            f"strategy '{strategy_id}': '{base_id}' cannot have controls; allowed families after "
            f"the dot: {allowed}"
        )
    return base


def _parameters(head: str, cls: type[Strategy], strategy_id: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for token in head.split("_")[1:]:
        name, value = _parse_token(token, cls, strategy_id)
        if name in values:
            raise InputError(f"strategy '{strategy_id}': {name} is given twice; allowed: once")
        values[name] = value
    return values


def _parse_token(token: str, cls: type[Strategy], strategy_id: str) -> tuple[str, object]:
    by_code = {code: name for name, code in cls.codes.items()}
    match = re.fullmatch(r"([a-z]+)([0-9]+)", token)
    if match and match[1] in by_code:
        name = by_code[match[1]]
        return name, decode(match[2], fraction=cls.is_fraction(name))
    word, words = token.replace("-", "_"), (*cls.words, *cls.common_words)
    for name in words:
        if cls.accepts(name, word):
            return name, word
    allowed = [f"{code}<number>" for code in by_code]
    allowed += [choice.replace("_", "-") for name in words for choice in cls.choices(name)]
    raise InputError(
        f"strategy '{strategy_id}': unknown part '{token}'; allowed: {', '.join(allowed) or 'none'}"
    )
