"""Numbers and lists as text: the one place for digits, signs and units."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_routing.vocabulary import METRICS

MINUS = "\N{MINUS SIGN}"


def count(value: float) -> str:
    """Write a whole number: 10,042.

    >>> count(10042)
    '10,042'
    """
    return f"{int(value):,}"


def percent(value: float, decimals: int = 1) -> str:
    """Write a proportion: 0.254 is 25.4 %.

    >>> percent(0.254)
    '25.4 %'
    """
    return f"{100 * value:.{decimals}f} %"


def experts(value: float) -> str:
    """Write a mean number of experts with at most two decimals: 8, 5.3, 1.25.

    >>> experts(8.0), experts(5.297)
    ('8', '5.3')
    """
    return f"{value:.2f}".rstrip("0").rstrip(".")


def quality(value: float, metric: str) -> str:
    """Write a metric without its unit: accuracies in percent, losses with 4 digits.

    >>> quality(0.5512, "accuracy"), quality(20.1234, "token_perplexity")
    ('55.1', '20.12')
    """
    if METRICS[metric].is_proportion:
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:#.4g}"


def estimate(value: float, low: float, high: float, metric: str) -> str:
    """Write a value and its interval as in a table: 55.1 [52.6, 57.6].

    >>> estimate(0.5512, 0.526, 0.576, "accuracy")
    '55.1 [52.6, 57.6]'
    """
    return f"{quality(value, metric)} [{quality(low, metric)}, {quality(high, metric)}]"


def p_value(value: float) -> str:
    """Write a p-value: p = 0.012, or p < 0.001.

    >>> p_value(0.0123), p_value(0.00002)
    ('p = 0.012', 'p < 0.001')
    """
    if value < 0.001:
        return "p < 0.001"
    return "p > 0.999" if value > 0.999 else f"p = {value:.3f}"


def signed(value: float, decimals: int) -> str:
    """Write a difference with its sign; one that rounds to 0 has none.

    >>> signed(0.031, 2), signed(-0.031, 2) == f"{MINUS}0.03", signed(-0.0001, 2)
    ('+0.03', True, '0.00')
    """
    text = f"{abs(value):.{decimals}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def difference(value: float, low: float, high: float, metric: str) -> str:
    """Write a difference and its limits with their unit; the interval sets the digits.

    >>> difference(0.031, 0.019, 0.042, "accuracy")
    '+3.1 percentage points [+1.9, +4.2]'
    >>> difference(0.031, 0.02, 0.04, "nats_per_token")
    '+0.031 nats per token [+0.020, +0.040]'
    """
    entry = METRICS[metric]
    scale = entry.percent
    decimals = _decimals(scale * (high - low), fewest=1 if entry.is_proportion else 3)
    middle, *limits = (signed(scale * x, decimals) for x in (value, low, high))
    return f"{middle} {entry.unit} [{', '.join(limits)}]"


def magnitude(value: float, metric: str) -> str:
    """Write a margin or detectable difference, without sign.

    >>> magnitude(0.01, "accuracy"), magnitude(0.01, "nats_per_token")
    ('1 percentage point', '0.01 nats per token')
    """
    entry = METRICS[metric]
    text = f"{entry.percent * value:.2g}"
    one = entry.is_proportion and text == "1"
    return f"{text} {entry.unit.removesuffix('s') if one else entry.unit}"


def small_difference(value: float, metric: str) -> str:
    """Write a difference that may be tiny, without sign: 0, 0.05 percentage points, 3e-07 nats.

    >>> small_difference(0.0005, "accuracy"), small_difference(3.2e-7, "nats_per_token")
    ('0.05 percentage points', '3.2e-07 nats per token')
    """
    return f"{METRICS[metric].percent * value:.2g} {METRICS[metric].unit}"


def divergence(value: float) -> str:
    """Write a KL divergence in nats with two digits.

    >>> divergence(0.01234), divergence(0.0), divergence(2.345)
    ('0.012', '0', '2.3')
    """
    return "0" if value == 0 else f"{value:.2g}"


def measure_words(metric: str) -> str:
    """Return a measure as a noun: length-normalised accuracy, loss."""
    return METRICS[metric].noun or METRICS[metric].label


def listed(words: Sequence[str], conjunction: str = "and") -> str:
    """Join words: a, b and c.

    >>> listed(["a", "b", "c"]), listed([])
    ('a, b and c', 'none')
    """
    words = list(words)
    if len(words) < 2:
        return words[0] if words else "none"
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def code(strategies: Sequence[str]) -> str:
    """Join strategy ids as code: `a`, `b` and `c`."""
    return listed([f"`{name}`" for name in strategies])


def plural(n: int, noun: str) -> str:
    """Write a count and its noun: 1 setting, 3 settings, no setting.

    >>> plural(0, "setting"), plural(1, "setting"), plural(3, "setting")
    ('no setting', '1 setting', '3 settings')
    """
    return f"no {noun}" if n == 0 else f"{count(n)} {noun}{'' if n == 1 else 's'}"


def _decimals(width: float, fewest: int) -> int:
    """Return the decimals that show a width with two digits: from ``fewest`` to 4."""
    if width <= 0 or not math.isfinite(width):
        return fewest
    return min(4, max(fewest, 1 - math.floor(math.log10(width))))
