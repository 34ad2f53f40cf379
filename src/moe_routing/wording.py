"""Numbers and lists as text, in analyses, figures and reports: one place for digits and signs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from moe_routing.vocabulary import METRICS

MINUS = "\N{MINUS SIGN}"
MOST_DECIMALS, MOST_DIGITS = 6, 3
"""Decimals of the finest interval, and significant digits of a value that has one."""

_SUPERSCRIPTS = str.maketrans(
    "0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
)


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


def interval(
    value: float, low: float, high: float, *, fewest: int = -2, most: int = MOST_DECIMALS
) -> str:
    """Write a value and its limits with the digits that the interval supports.

    Args:
        value: the value.
        low: lower limit.
        high: upper limit.
        fewest: at least this many decimals; negative ones round to tens and hundreds.
        most: at most this many.

    >>> interval(0.00931, 0.00784, 0.0108), interval(125.8, 112.4, 145.1)
    ('0.0093 [0.0078, 0.0108]', '126 [112, 145]')
    >>> interval(2479, 1813, 4049)
    '2,500 [1,800, 4,000]'
    """
    decimals = min(most, max(fewest, _decimals(low, high)), _digits(value, low, high))
    middle, *limits = (_rounded(x, decimals) for x in (value, low, high))
    return f"{middle} [{', '.join(limits)}]"


def share(value: float, low: float, high: float) -> str:
    """Write a proportion and its limits in percent.

    >>> share(0.0453, 0.039, 0.053), share(0.082, 0.012, 0.736)
    ('4.5 % [3.9, 5.3]', '8 % [1, 74]')
    """
    middle, limits = percentage(value, low, high).split(" ", 1)
    return f"{middle} % {limits}"


def percentage(value: float, low: float, high: float) -> str:
    """Write a proportion and its limits in percent without the sign, as in a table.

    >>> percentage(0.0453, 0.039, 0.053)
    '4.5 [3.9, 5.3]'
    """
    return interval(100 * value, 100 * low, 100 * high, fewest=0, most=1)


def estimate(value: float, low: float, high: float, metric: str) -> str:
    """Write a metric and its interval without unit, as in a table; accuracies in percent.

    >>> estimate(0.5512, 0.526, 0.576, "accuracy")
    '55.1 [52.6, 57.6]'
    """
    scale = METRICS[metric].percent
    return interval(scale * value, scale * low, scale * high)


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


def difference(value: float, low: float, high: float, metric: str, *, unit: bool = True) -> str:
    """Write a difference and its limits; the interval sets the digits.

    Nats have three decimals and percentage points one, so that columns align, unless the interval
    is narrower than that.

    >>> difference(0.031, 0.019, 0.042, "accuracy")
    '+3.1 percentage points [+1.9, +4.2]'
    >>> difference(0.031, 0.02, 0.04, "nats_per_token", unit=False)
    '+0.031 [+0.020, +0.040]'
    """
    entry = METRICS[metric]
    scale, fewest = entry.percent, 1 if entry.is_proportion else 3
    decimals = max(fewest, _decimals(scale * low, scale * high) - 1)
    decimals = min(decimals, _digits(scale * value, scale * low, scale * high))
    middle, *limits = (signed(scale * x, max(decimals, 0)) for x in (value, low, high))
    unit_words = f" {entry.unit}" if unit else ""
    return f"{middle}{unit_words} [{', '.join(limits)}]"


def size(value: float, low: float, high: float, metric: str) -> str:
    """Write how large a difference is that excludes 0, for a sentence that says its direction.

    >>> size(-0.0223, -0.029, -0.017, "nats_per_token")
    '0.022 nats per token [0.017, 0.029]'
    """
    low, high = sorted((abs(low), abs(high)))
    return difference(abs(value), low, high, metric).replace("+", "")


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
    """Write a difference that may be tiny, without sign: 0, 0.05 percentage points, 3e-7 nats.

    >>> small_difference(0.0005, "accuracy"), small_difference(0, "nats_per_token")
    ('0.05 percentage points', '0 nats per token')
    """
    return f"{scientific(METRICS[metric].percent * value)} {METRICS[metric].unit}"


def scientific(value: float) -> str:
    """Write a number with two digits, a tiny one by its power of ten.

    >>> scientific(0.00123), scientific(9.8e-6) == "9.8 \N{MULTIPLICATION SIGN} 10⁻⁶"
    ('0.0012', True)
    """
    return typeset(f"{value:.2g}")


def typeset(text: str) -> str:
    """Write the numbers of a text by program as in the rest of the report.

    >>> typeset("95% below 1e-5") == "95 % below 10⁻⁵", typeset("-0.8") == f"{MINUS}0.8"
    (True, True)
    """
    text = re.sub(r"(?<=\d)%", " %", text)
    text = re.sub(r"(?<![\w.])(\d(?:\.\d+)?)e([-+]\d+)", _power_of_ten, text)
    return re.sub(r"(?<![\w.])-(?=\d)", MINUS, text)


def _power_of_ten(found: re.Match[str]) -> str:
    power = f"10{str(int(found[2])).translate(_SUPERSCRIPTS)}"
    return power if found[1] == "1" else f"{found[1]} \N{MULTIPLICATION SIGN} {power}"


def measure_words(metric: str) -> str:
    """Return a measure as a noun: length-normalised accuracy, loss."""
    return METRICS[metric].noun or METRICS[metric].label


def as_words(name: str) -> str:
    """Return the id of a null, design or score as words.

    >>> as_words("within_token"), as_words("needed_e1e4") == "needed, epsilon 10⁻⁴"
    ('within token', True)
    """
    return typeset(re.sub(r" e(\d+)e(\d+)", r", epsilon \1e-\2", str(name).replace("_", " ")))


def capital(text: str) -> str:
    """Return a clause or label with a capital first letter and the rest as it is.

    >>> capital("fixed k, compensated"), capital("BH")
    ('Fixed k, compensated', 'BH')
    """
    return text[:1].upper() + text[1:]


def spread(low: float, high: float, decimals: int = 1) -> str:
    """Write the ends of a range of proportions: 4.5 to 14.3 %, or one number if they round alike.

    >>> spread(0.045, 0.143), spread(0.2, 0.2)
    ('4.5 to 14.3 %', '20.0 %')
    """
    ends = dict.fromkeys(f"{100 * value:.{decimals}f}" for value in (low, high))
    return f"{' to '.join(ends)} %"


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


def _decimals(low: float, high: float) -> int:
    """Return the decimals of the first digit of half the width, and of the next after a 1 or 2."""
    half = (high - low) / 2
    if not (half > 0 and math.isfinite(half)):
        return 0
    exponent = math.floor(math.log10(half))
    return (half < 3 * 10**exponent) - exponent


def _digits(*values: float) -> int:
    """Return the decimals at which the largest of some values has three significant digits."""
    largest = max(map(abs, values))
    if not (largest > 0 and math.isfinite(largest)):
        return MOST_DECIMALS
    return MOST_DIGITS - 1 - math.floor(math.log10(largest))


def _rounded(value: float, decimals: int) -> str:
    text = f"{round(value, decimals):,.{max(decimals, 0)}f}"
    return text.removeprefix("-") if not float(text.replace(",", "")) else text.replace("-", MINUS)
