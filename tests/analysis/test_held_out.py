"""The held-out false discovery rate where the truth is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_toggles import EPSILON, EXPERTS, LAYERS, TOKENS, simulate

from moe_routing.analysis.held_out import held_out_fdr
from moe_routing.analysis.null_size import Evidence
from moe_routing.routing.nulls import fit_null, sample_inputs
from moe_routing.routing.nulls.needed import Needed
from moe_routing.routing.procedures import bh_levels, by_levels, step_up
from moe_routing.statistics.proportions import wilson_interval

INTERVAL = {"confidence": 0.95, "resamples": 200}


@pytest.fixture(scope="module")
def simulated():
    return simulate()


@pytest.fixture(scope="module")
def fitted(simulated):
    sample, toggles, *_ = simulated
    null = fit_null("needed_e1e4", sample, toggles.of_documents(range(TOKENS // 4)))
    assert isinstance(null, Needed)
    return null


@pytest.fixture(scope="module")
def held_out(simulated):
    """Toggles of the other half of the documents, with probabilities and true effects."""
    _, toggles, probability_LTE, kl_LTE = simulated
    later_T = slice(TOKENS // 2, None)
    test = toggles.of_documents(range(TOKENS // 4, TOKENS // 2))
    return test, probability_LTE[:, later_T], kl_LTE[:, later_T]


def test_the_rate_is_at_most_alpha_and_near_the_truth(fitted, held_out, rng):
    test, probability_LTE, kl_LTE = held_out
    alphas = [0.05, 0.1, 0.2]
    table = held_out_fdr(fitted, test, alphas, **INTERVAL, rng=rng)
    assert table["layer"].tolist() == ["0", "1", "all"] * 3
    assert set(table["n_documents"]) == {TOKENS // 4}
    for alpha, rows in table.groupby("alpha"):
        row = rows[rows["layer"] == "all"].iloc[0]
        proportions, counts = [], []
        for layer in range(LAYERS):
            critical = fitted.critical_values(
                layer, torch.arange(1, EXPERTS + 1) / EXPERTS * torch.tensor(alpha).double()
            ).tolist()
            for p_E, kl_E in zip(probability_LTE[layer], kl_LTE[layer], strict=True):
                order = sorted(range(EXPERTS), key=lambda e: -float(p_E[e]))
                passes = [k + 1 for k in range(EXPERTS) if float(p_E[order[k]]) >= critical[k]]
                kept = order[: max(passes, default=0)]
                false = sum(float(kl_E[expert]) < EPSILON for expert in kept)
                proportions.append(false / max(1, len(kept)))
                counts.append(len(kept))
        error = (row["high"] - row["low"]) / 4
        assert row["mean_rejected"] == pytest.approx(np.mean(counts))
        assert row["mean_rejected"] > 0.3
        # Lower ranks are sampled in the estimate, not here.
        assert row["fdr"] == pytest.approx(np.mean(proportions), abs=2 * error)
        assert row["fdr"] <= alpha + 3 * math.sqrt(2) * error
        assert row["low"] < row["fdr"] < row["high"]


def test_the_rate_of_all_experts_is_their_share(simulated, fitted, held_out, rng):
    """With every expert selected the weighted proportion estimates that of the true nulls."""
    test, _, kl_LTE = held_out
    table = held_out_fdr(
        fitted,
        test,
        [0.5],
        levels=lambda experts, alpha: torch.ones(experts, dtype=torch.float64),
        **INTERVAL,
        rng=rng,
    )
    assert (table["mean_rejected"] == EXPERTS).all()
    share_L = (kl_LTE < EPSILON).double().mean((1, 2)).tolist()
    assert table["fdr"].tolist()[:2] == pytest.approx(share_L, abs=0.01)
    assert table["fdr"].iloc[2] == pytest.approx(np.mean(share_L), abs=0.01)


def test_the_routed_set_has_a_floor_and_a_cap(fitted, held_out, rng):
    """Against a loop over tokens; and nothing changes where neither binds."""
    test, probability_LTE, _ = held_out
    table = held_out_fdr(fitted, test, [0.05], max_k=3, **INTERVAL, rng=rng)
    assert table["part"].tolist() == ["rule"] * 3 + ["routed"] * 3
    rule, routed = (table[table["part"] == part].reset_index() for part in ("rule", "routed"))
    critical = fitted.critical_values(0, bh_levels(EXPERTS, 0.05)).tolist()
    pairs = list(zip(test.layer_P.tolist(), test.token_P.tolist(), test.rank_P.tolist(),
                     test.sampling_weight_P.tolist(), test.kl_P.tolist(), strict=True))  # fmt: skip
    false = {}
    for layer, token, rank, weight, kl in pairs:
        if layer == 0 and kl < EPSILON:
            false.setdefault(token, []).append((rank, weight))
    proportions, counts = [], []
    for token, p_E in enumerate(probability_LTE[0].sort(descending=True).values.tolist()):
        count = max((k + 1 for k in range(EXPERTS) if p_E[k] >= critical[k]), default=0)
        counts.append(count)
        kept = min(max(count, 1), 3)
        proportions.append(sum(w for rank, w in false.get(token, []) if rank < kept) / kept)
    assert routed["fdr"][0] == pytest.approx(np.mean(proportions))
    assert routed["mean_rejected"][0] == pytest.approx(np.clip(counts, 1, 3).mean())
    for part in (rule, routed):
        assert part["empty_proportion"][0] == pytest.approx(np.mean([n == 0 for n in counts]))
        assert part["cap_proportion"][0] == pytest.approx(np.mean([n > 3 for n in counts]))
    assert routed["fdr"][0] > rule["fdr"][0]  # the floor adds experts that BH does not select


def test_a_rate_of_zero_has_an_upper_limit(fitted, held_out, rng):
    test = replace(held_out[0], kl_P=torch.ones_like(held_out[0].kl_P))
    row = held_out_fdr(fitted, test, [0.1], **INTERVAL, rng=rng).iloc[0]
    assert (row["fdr"], row["low"]) == (0, 0)
    assert row["high"] == pytest.approx(wilson_interval(0, TOKENS // 4, 0.95)[1])


def test_by_selects_fewer(fitted, held_out, rng):
    test, *_ = held_out
    bh, by = (
        held_out_fdr(fitted, test, [0.2], **INTERVAL, **levels, rng=rng).iloc[2]
        for levels in ({}, {"levels": by_levels})
    )
    assert by["mean_rejected"] < bh["mean_rejected"]
    assert by["fdr"] < bh["fdr"]


def test_evidence_counts_as_the_procedure_does(simulated, fitted):
    sample, *_ = simulated
    p_TE, _ = fitted.sorted_p_values(sample_inputs(sample, 1))
    found_T = Evidence.of(fitted, sample, 1, [0.1]).rejections(0.1)
    assert torch.equal(found_T, step_up(p_TE, bh_levels(EXPERTS, 0.1)))
    assert len(found_T.unique()) > 2


def test_documents_keep_their_tokens(simulated):
    _, toggles, probability_LTE, _ = simulated
    part = toggles.of_documents([3, 7])
    assert part.document_P.unique().tolist() == [3, 7]
    assert torch.equal(part.weight_LTE, probability_LTE[:, [6, 7, 14, 15]])
    assert torch.equal(part.weight_LTE[part.layer_P, part.token_P, part.expert_P], part.weight_P)
