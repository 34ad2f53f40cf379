"""The held-out false discovery rate where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_routing.analysis.held_out import held_out_fdr
from moe_routing.analysis.null_size import Evidence
from moe_routing.routing.nulls import fit_null, sample_inputs
from moe_routing.routing.nulls.needed import Needed
from moe_routing.routing.procedures import bh_levels, by_levels, step_up
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.toggles import Toggles

LAYERS, TOKENS, EXPERTS, EPSILON = 2, 1600, 16, 1e-4
INTERVAL = {"confidence": 0.95, "resamples": 200}


@pytest.fixture(scope="module")
def simulated():
    """Tokens, two per document, with the top 4 and a third of the other experts toggled."""
    rng = np.random.default_rng(5)
    logits_LTE = 1.5 * torch.from_numpy(rng.standard_normal((LAYERS, TOKENS, EXPERTS))).float()
    probability_LTE = logits_LTE.softmax(-1)
    document_T = torch.arange(TOKENS) // 2
    token_T = torch.from_numpy(rng.normal(0, 1, TOKENS // 2))[document_T]
    noise_LTE = token_T[:, None] + torch.from_numpy(rng.normal(0, 1, probability_LTE.shape))
    kl_LTE = 0.01 * probability_LTE.double() ** 2 * noise_LTE.exp()
    order_LTE = probability_LTE.argsort(-1, descending=True)
    toggled_LTE = torch.ones(LAYERS, TOKENS, EXPERTS, dtype=torch.bool)
    place_LTN = torch.from_numpy(rng.random((LAYERS, TOKENS, 12))).argsort(-1).argsort(-1)
    toggled_LTE[..., 4:] = place_LTN < 4
    layer_P, token_P, rank_P = toggled_LTE.nonzero().T
    expert_P = order_LTE[layer_P, token_P, rank_P]
    weight_E = torch.where(torch.arange(EXPERTS) < 4, 1.0, 3.0).double()
    kl_P = kl_LTE[layer_P, token_P, expert_P]
    toggles = Toggles(
        document_P=document_T[token_P],
        position_P=token_P % 2,
        layer_P=layer_P,
        expert_P=expert_P,
        rank_P=rank_P,
        logits_LTE=logits_LTE,
        hidden_LTH=torch.zeros(LAYERS, TOKENS, 1),
        norm_LTE=torch.ones_like(probability_LTE),
        deviation_LTE=torch.ones_like(probability_LTE),
        kl_P=kl_P,
        loss_change_P=kl_P,
        compensated_kl_P=kl_P,
        compensated_loss_change_P=kl_P,
        sampling_weight_P=weight_E[rank_P],
        rank_weight_E=weight_E,
        noise_L=torch.zeros(LAYERS, dtype=torch.float64),
        rule=ModelRule(4, "softmax"),
        fingerprint="simulated",
    )
    sample = CalibrationSample(
        logits_LTE,
        logits_LTE,
        torch.ones(LAYERS, TOKENS),
        torch.ones(LAYERS, TOKENS),
        torch.ones(LAYERS, EXPERTS),
        hidden_size=8,
        rule=ModelRule(4, "softmax"),
        fingerprint="simulated",
    )
    return sample, toggles, probability_LTE, kl_LTE


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
