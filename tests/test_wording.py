"""Numbers in words."""

from __future__ import annotations

import doctest

import pytest

from moe_routing import wording


def test_examples():
    result = doctest.testmod(wording)
    assert result.attempted >= 14
    assert result.failed == 0


@pytest.mark.parametrize(
    ("width", "shown"),
    [(0.2, "+3.1 percentage points"), (0.0002, "+3.14 percentage points")],
)
def test_digits_follow_the_interval(width, shown):
    text = wording.difference(0.0314, 0.0314 - width / 2, 0.0314 + width / 2, "accuracy")
    assert text.startswith(f"{shown} [")


def test_p_values_never_read_as_certain():
    assert wording.p_value(0.0) == "p < 0.001"
    assert wording.p_value(1.0) == "p > 0.999"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((123456.7, 120000, 127000), "123,000 [120,000, 127,000]"),
        ((0.0, 0.0, 0.0), "0 [0, 0]"),
        ((0.003, 0.0029861, 0.0030148), "0.00300 [0.00299, 0.00301]"),
        ((-0.00001, -0.004, 0.004), f"0.000 [{wording.MINUS}0.004, 0.004]"),
        ((0.5, 0.5, float("nan")), "0 [0, nan]"),
    ],
)
def test_an_interval_has_the_digits_that_it_supports(numbers, text):
    assert wording.interval(*numbers) == text


def test_limits_have_the_digits_of_the_estimate():
    for text in (wording.interval(0.1, 0.088, 0.112), wording.share(0.0453, 0.0390, 0.0531)):
        numbers = [part.strip("[],%") for part in text.replace("% ", "").split()]
        assert len({len(number.partition(".")[2]) for number in numbers}) == 1
