from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import integrate, stats
from slow_loops import PROCEDURES, hc_critical
from statsmodels.stats.multitest import multipletests

from moe_routing.routing import levels, procedures


def count(name: str, p_TE: np.ndarray, alpha: float) -> np.ndarray:
    """Run a procedure on unsorted p-values."""
    sorted_TE = torch.from_numpy(np.sort(p_TE, axis=1))
    experts = p_TE.shape[1]
    if name == "storey":
        return procedures.storey(sorted_TE, alpha).numpy()
    if name == "hc":
        critical = hc_critical(experts, alpha)
        return procedures.higher_criticism(sorted_TE, critical).numpy()
    level_E = getattr(procedures, f"{name}_levels")(experts, alpha)
    return procedures.step_up(sorted_TE, level_E).numpy()


def p_vectors(rng: np.random.Generator, vectors: int, experts: int = 64) -> np.ndarray:
    """Mixtures of null, strong, tied and exactly critical p-values, float32."""
    p = rng.random((vectors, experts))
    signal = rng.random((vectors, experts)) < rng.random((vectors, 1))
    p = np.where(signal, p ** rng.integers(1, 6, (vectors, 1)), p)
    p[::4] = np.round(p[::4], 2).clip(0.01)
    critical = 0.05 * rng.integers(1, experts + 1, (vectors, experts)) / experts
    p[1::4] = np.where(rng.random((len(p[1::4]), experts)) < 0.5, critical[1::4], p[1::4])
    return p.astype(np.float32)


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40)))
def test_num_rejected_is_the_largest_true_column(passes):
    slow = [max((i for i, ok in enumerate(row, 1) if ok), default=0) for row in passes.tolist()]
    passes_TE = torch.from_numpy(passes)
    assert procedures.num_rejected(passes_TE).tolist() == slow
    if passes.shape[1]:
        assert procedures._num_rejected_on_device(passes_TE).tolist() == slow


@pytest.mark.parametrize("columns", [1, 8, 53, 54, 63, 64, 65, 128, 200])
def test_num_rejected_of_long_rows(rng, columns):
    """Every column is the last true one of a row that is full before it and of an empty one."""
    full = np.tri(columns, dtype=bool)
    random = full & (rng.random(full.shape) < 0.5) | np.eye(columns, dtype=bool)
    rows = np.concatenate([full, np.eye(columns, dtype=bool), random, np.zeros_like(full)])
    last = np.concatenate([np.tile(np.arange(1, columns + 1), 3), np.zeros(columns, int)])
    for passes in (rows, np.asfortranarray(rows)):
        assert np.array_equal(procedures.num_rejected(torch.from_numpy(passes)), last)


def test_num_rejected_at_critical_values(rng):
    value_TE = torch.from_numpy(rng.normal(size=(200, 64)).astype(np.float32))
    value_TE[::3] = -torch.inf
    critical_E = torch.from_numpy(rng.normal(size=64).astype(np.float32) + 3)
    critical_E[7], critical_E[9] = torch.inf, value_TE[1, 9]
    found_T = procedures.num_rejected_at(value_TE, critical_E)
    assert torch.equal(found_T, procedures.num_rejected(value_TE >= critical_E))
    assert len(found_T.unique()) > 20


@pytest.mark.parametrize(("name", "method"), [("bh", "fdr_bh"), ("by", "fdr_by")])
def test_step_up_equals_statsmodels_on_10000_vectors(rng, name, method):
    p_TE = p_vectors(rng, 10_000)
    theirs = [multipletests(p.astype(float), 0.05, method)[0].sum() for p in p_TE]
    ours = count(name, p_TE, 0.05)
    assert np.array_equal(ours, theirs)
    assert len(np.unique(ours)) > 30  # the vectors do put the procedure to the test


@pytest.mark.parametrize("name", sorted(PROCEDURES))
@given(
    p=arrays(
        np.float32,
        st.tuples(st.integers(0, 4), st.sampled_from([1, 2, 5, 64])),
        elements=st.one_of(
            st.sampled_from([1.0, 0.5, 0.05, 0.025, 0.0125, 1e-9, 1e-30]),
            st.floats(2**-40, 1, width=32),
        ),
    ),
    alpha=st.sampled_from([0.01, 0.05, 0.1, 0.5, 0.9]),
)
@settings(max_examples=40)
def test_every_procedure_equals_a_loop(name, p, alpha):
    slow = [PROCEDURES[name](sorted(row.tolist()), alpha) for row in p]
    assert count(name, p, alpha).tolist() == slow


def test_a_level_is_met_by_the_float32_p_value_just_below_it_only():
    # 0.05 is not a float32: the nearest one is larger, and must not pass.
    level_E = procedures.threshold_levels(1, 0.05)
    nearest = np.float32(0.05)
    assert float(nearest) > 0.05
    assert procedures.step_up(torch.tensor([[float(nearest)]]), level_E).item() == 0
    below = np.nextafter(nearest, np.float32(0))
    assert procedures.step_up(torch.tensor([[float(below)]]), level_E).item() == 1


def test_calibrated_e_values_have_mean_one_and_match_their_definition():
    def e_of(p: float) -> float:
        return float(levels.p_to_e(math.log(p)))

    # Over u = -log p, where the integrand is tame.
    mean, _ = integrate.quad(lambda u: e_of(math.exp(-u)) * math.exp(-u), 1e-12, 600, limit=500)
    tail = 1 / 600  # the integral of 1 / u^2 beyond
    assert mean + tail == pytest.approx(1, abs=1e-4)
    for p in (1e-12, 1e-3, 0.3, 0.99, 0.9999, 0.99999):
        mixture, _ = integrate.quad(lambda kappa, p=p: kappa * p ** (kappa - 1), 0, 1)
        assert e_of(p) == pytest.approx(mixture, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("experts", [2, 8, 64])
def test_higher_criticism_has_its_size_exactly(rng, experts, alpha):
    critical = procedures.hc_critical(experts, alpha)
    assert procedures.hc_size(experts, critical) == pytest.approx(alpha, abs=1e-9)
    runs = 40_000
    size = (count("hc", rng.random((runs, experts)), alpha) > 0).mean()
    assert abs(size - alpha) < 4 * math.sqrt(alpha * (1 - alpha) / runs)


def simulate(
    rng: np.random.Generator, correlation: float, runs: int = 20_000, experts: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Return one-sided p-values of normal scores and which are true nulls (the first 48)."""
    common = rng.standard_normal((runs, 1)) * math.sqrt(correlation)
    score = common + rng.standard_normal((runs, experts)) * math.sqrt(1 - correlation)
    score[:, 48:] += 2.5
    return stats.norm.sf(score).astype(np.float32), np.arange(experts) < 48


def false_discovery_proportions(p: np.ndarray, null: np.ndarray, rejected: np.ndarray):
    order = np.argsort(p, axis=1, kind="stable")
    taken = np.arange(p.shape[1]) < rejected[:, None]
    return (null[order] & taken).sum(1) / np.maximum(1, rejected)


def test_bh_has_its_false_discovery_rate_under_independence(rng):
    p, null = simulate(rng, correlation=0.0)
    for alpha in (0.01, 0.05, 0.1):
        rejected = count("bh", p, alpha)
        fdp = false_discovery_proportions(p, null, rejected)
        error = fdp.std() / math.sqrt(len(fdp))
        assert abs(fdp.mean() - alpha * 48 / 64) < 3 * error
        assert rejected.mean() > 3


@pytest.mark.parametrize("name", ["by", "ebh"])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.8])
def test_procedures_for_any_dependence_keep_the_rate_under_equicorrelation(rng, name, correlation):
    p, null = simulate(rng, correlation)
    rejected = count(name, p, 0.1)
    assert false_discovery_proportions(p, null, rejected).mean() < 0.1 * 48 / 64
    assert rejected.mean() > 0.05


def test_storey_keeps_the_rate_and_finds_more_than_bh(rng):
    p, null = simulate(rng, correlation=0.0)
    rejected = count("storey", p, 0.1)
    fdp = false_discovery_proportions(p, null, rejected)
    assert fdp.mean() < 0.1 + 3 * fdp.std() / math.sqrt(len(fdp))
    assert rejected.mean() > count("bh", p, 0.1).mean()


def test_higher_criticism_and_thresholds_do_not_control_the_rate(rng):
    p, null = simulate(rng, correlation=0.0)
    for name in ("hc", "threshold"):
        fdp = false_discovery_proportions(p, null, count(name, p, 0.1))
        assert fdp.mean() > 0.15


def test_no_tokens_and_one_expert_are_legal():
    for name in PROCEDURES:
        assert count(name, np.empty((0, 64), np.float32), 0.05).shape == (0,)
    one = np.array([[0.01], [0.9]], np.float32)
    assert count("bh", one, 0.05).tolist() == [1, 0]
    assert count("hc", one, 0.05).tolist() == [0, 0]
