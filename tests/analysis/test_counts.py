"""Histograms of experts equal the counts that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_routing.analysis.counts import (
    QUANTILES,
    capped_means,
    histogram_quantiles,
    reduction_percent,
    saturation_point,
)

COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=60)


@given(COUNTS)
def test_quantiles_are_numpys(counts):
    histogram = np.bincount(counts, minlength=13)
    expected = np.quantile(counts, QUANTILES, method="inverted_cdf")
    assert histogram_quantiles(histogram, QUANTILES).tolist() == expected.tolist()


@given(COUNTS)
def test_capped_means_are_means_of_capped_counts(counts):
    found = capped_means(np.bincount(counts, minlength=13))
    assert np.allclose(found, [np.minimum(counts, cap).mean() for cap in range(1, 13)])


@given(COUNTS.filter(any))
def test_saturation_is_the_first_cap_that_suffices(counts):
    cap = saturation_point(np.bincount(counts, minlength=13), 0.9)
    full = np.mean(counts)
    assert np.minimum(counts, cap).mean() >= 0.9 * full - 1e-9
    assert cap == 1 or np.minimum(counts, cap - 1).mean() < 0.9 * full + 1e-9


def test_reduction():
    assert reduction_percent(4.0, 16) == pytest.approx(75.0)
    assert reduction_percent(16.0, 8) == pytest.approx(-100.0)
