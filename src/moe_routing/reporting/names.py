"""The names of strategies in words."""

from __future__ import annotations

from moe_routing.errors import InputError
from moe_routing.routing.strategies import control_kinds, family_entry, parse_strategy
from moe_routing.statistics.rules import CERTIFIED, STATIC, THRESHOLD, RuleKind, kind_of

MIXTURE_OF = "mixture."
_SCORES = {
    "mean_norm": "probability times mean output norm",
    "norm": "probability times predicted output norm",
    "consequence": "predicted consequence",
    "exact_norm": "probability times output norm",
}


def rule_words(kind: RuleKind) -> str:
    """Return a rule in words that need no table.

    >>> rule_words(RuleKind("absolute", "consequence", "compensated"))
    'one threshold on predicted consequence (mean outputs in place of dropped experts)'
    >>> rule_words(RuleKind("static"))
    'a fixed number of experts'
    >>> rule_words(RuleKind("topp"))
    'top-p routing'
    >>> rule_words(RuleKind("certified", "consequence", "compensated"))
    'certified routing'
    """
    names = {
        STATIC: "a fixed number of experts",
        CERTIFIED: "certified routing",
        THRESHOLD: "one threshold",
        "bh": "BH routing",
    }
    text = names.get(kind.rule) or family_entry(kind.rule).words
    if kind.rule == CERTIFIED:  # what it ranks by is part of the name
        return text
    if kind.score in _SCORES:
        text += f" {'ranked by' if kind.rule == STATIC else 'on'} {_SCORES[kind.score]}"
    elif kind.rule == THRESHOLD:
        text += " on the probability"
    if kind.dropped == "compensated":
        text += " (mean outputs in place of dropped experts)"
    if kind.weighting != "own":
        text += f" with {kind.weighting.replace('_', '-')} weights"
    return text


def in_words(strategy_id: str, own_weighting: str) -> str:
    """Return what a strategy is in words, for a sentence.

    >>> in_words("stock", "softmax"), in_words("bh_k8_a005", "softmax")
    ('the stock model', 'BH routing')
    >>> in_words("mixture.bh_k8_a005", "softmax")
    'fixed numbers of experts mixed to the same mean'
    >>> in_words("shuffle.bh_k8_a005", "softmax")
    'BH routing with counts shuffled over tokens'
    """
    if strategy_id.startswith(MIXTURE_OF):
        return "fixed numbers of experts mixed to the same mean"
    try:
        strategy = parse_strategy(strategy_id)
    except InputError:
        return f"`{strategy_id}`"
    if strategy.family.control:
        control, base = strategy_id.split(".", 1)
        return f"{in_words(base, own_weighting)} with {control_kinds()[control].short}"
    kind = kind_of(strategy, own_weighting)
    return "the stock model" if kind is None else rule_words(kind)


def short_words(strategy_id: str, own_weighting: str) -> str:
    """Return the kind of a strategy in few words, for a legend.

    >>> short_words("stock", "softmax"), short_words("absolute_k8_b4_compensated", "softmax")
    ('stock', 'one threshold, compensated')
    """
    kind = kind_of(parse_strategy(strategy_id), own_weighting)
    return strategy_id if kind is None else kind.words
