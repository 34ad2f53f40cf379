"""Simulated calibration samples, and nulls fitted on them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from slow_loops import simulated_sample, simulated_toggles

from moe_routing.errors import InputError
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import NULLS, fit_null


@functools.cache
def calibrated(experts: int) -> Calibration:
    """Return a calibration with every null that a router of this size can have."""
    sample = simulated_sample(experts=experts, tokens=3200, rng=np.random.default_rng(experts))
    nulls = {}
    for name, null in NULLS.items():
        try:
            nulls[name] = null.fit(sample)
        except InputError:
            assert name == "unselected"
            assert sample.top_k == experts
    rng = np.random.default_rng(experts)
    probability_LTE = sample.logits_LTE.softmax(-1).numpy()
    # Of a router of one expert too, H0 holds for some pairs.
    kl_LTE = 0.03 * probability_LTE**2 * np.exp(rng.normal(0, 1.5, probability_LTE.shape))
    toggles = simulated_toggles(sample.logits_LTE.numpy(), kl_LTE, rng)
    nulls["needed"] = fit_null("needed", sample, toggles)
    return Calibration(sample, nulls, toggles)


@pytest.fixture(scope="session")
def calibration_of():
    return calibrated


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


@pytest.fixture
def sample(rng):
    """Two layers of normal logits, 8 of 64 experts with signal."""
    return simulated_sample(experts=64, tokens=3000, rng=rng)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
