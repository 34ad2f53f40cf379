"""Numbers in words."""

from __future__ import annotations

import doctest

import pytest

from moe_routing.reporting import wording


def test_examples():
    result = doctest.testmod(wording)
    assert result.attempted >= 14
    assert result.failed == 0


@pytest.mark.parametrize(
    ("width", "shown"),
    [(0.2, "+3.1 percentage points"), (0.002, "+3.14 percentage points")],
)
def test_digits_follow_the_interval(width, shown):
    text = wording.difference(0.0314, 0.0314 - width / 2, 0.0314 + width / 2, "accuracy")
    assert text.startswith(f"{shown} [")


def test_p_values_never_read_as_certain():
    assert wording.p_value(0.0) == "p < 0.001"
    assert wording.p_value(1.0) == "p > 0.999"


def test_large_perplexities_have_no_exponent():
    assert wording.quality(123456.7, "token_perplexity") == "123,457"
    assert wording.quality(999.96, "token_perplexity") == "1,000"
