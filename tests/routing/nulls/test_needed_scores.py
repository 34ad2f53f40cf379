"""The null ``needed`` with scores in place of the probability, and with substitutes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from slow_loops import HIDDEN, sample_of, simulated_outputs, simulated_toggles

from moe_routing.analysis.held_out import Judged, held_out_fdr
from moe_routing.analysis.needed import Verification
from moe_routing.errors import InputError
from moe_routing.reporting import findings_needed
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import diagnose, fit_null, load_null, save_null
from moe_routing.routing.nulls.needed import FREE_SCORES, choose_score, mean_kept, statistics
from moe_routing.routing.scores import ExpertScorer
from moe_routing.routing.strategies.testing import BH, MultipleTesting
from moe_routing.routing.types import RouterInputs
from moe_routing.vocabulary import NeededId

TOKENS, EXPERTS, EPSILON = 60, 64, 1e-4
IDS = ["needed_e1e4_norm", "needed_e1e4_mean_norm_compensated", "needed_e1e4_consequence"]


@pytest.fixture
def calibration(rng):
    """Toggles whose KL follows the squared product of weight and predicted norm."""
    return simulated(rng)


def simulated(rng, *, exponent=1.0):
    logits_LTE = 1.2 * rng.standard_normal((2, TOKENS, EXPERTS)).astype(np.float32)
    sample = sample_of(logits_LTE)
    outputs = simulated_outputs(sample, rng)
    outputs = dataclasses.replace(
        outputs,
        slope_LEH=3 * outputs.slope_LEH,
        log_mean_norm_LE=0.1 * outputs.log_mean_norm_LE,
    )
    hidden_LTH = torch.from_numpy(rng.standard_normal((2, TOKENS, HIDDEN), np.float32))
    log_norm_LTE = hidden_LTH @ outputs.slope_LEH.mT + outputs.offset_LE[:, None]
    size_LTE = sample.logits_LTE.softmax(-1) * (exponent * log_norm_LTE).exp()
    kl_LTE = 0.03 * size_LTE.numpy() ** 2 * np.exp(rng.normal(0, 0.3, logits_LTE.shape))
    toggles = dataclasses.replace(
        simulated_toggles(logits_LTE, kl_LTE, rng),
        hidden_LTH=hidden_LTH,
        norm_LTE=log_norm_LTE.exp(),
        deviation_LTE=log_norm_LTE.exp() / 2,
    )
    toggles = dataclasses.replace(toggles, compensated_kl_P=toggles.kl_P / 4)
    outputs = dataclasses.replace(outputs, sample_log_norm_LTE=log_norm_LTE)
    return Calibration(sample, {}, toggles, outputs)


def fitted(null_id, calibration):
    return fit_null(null_id, calibration.sample, calibration.toggles, None, calibration.outputs)


@pytest.mark.parametrize("null_id", IDS)
def test_p_values_equal_a_loop_over_toggled_pairs(calibration, null_id):
    toggles, null = calibration.toggles, fitted(null_id, calibration)
    score_LTE = statistics(toggles, calibration.outputs, null.name, null.score)
    effect_P = toggles.compensated_kl_P if null.compensated else toggles.kl_P
    pairs = list(
        zip(
            toggles.layer_P.tolist(), toggles.token_P.tolist(), toggles.expert_P.tolist(),
            toggles.sampling_weight_P.tolist(), (effect_P < EPSILON).tolist(), strict=True,
        )
    )  # fmt: skip
    here = [(float(score_LTE[1, t, e]), w, n) for at, t, e, w, n in pairs if at == 1]
    logits_TE = calibration.sample.logits_LTE[1, :8].clone()
    logits_TE[2, :9] = -math.inf
    score_TE = score_LTE[1, :8].where(logits_TE > -math.inf, -math.inf)
    inputs = RouterInputs(1, logits_TE, score_TE=score_TE)
    p_TE = null.p_values(inputs)
    for token in range(8):
        score_E = score_TE[token].tolist()
        order = sorted(range(EXPERTS), key=lambda e: (-score_E[e], e))
        for rank, expert in enumerate(order):
            own = float(toggles.rank_weight_E[rank])
            above = own + sum(w for g, w, n in here if n and g >= score_E[expert])
            p = above / (own + sum(w for _, w, _ in here))
            expected = 1.0 if score_E[expert] == -math.inf else p
            assert float(p_TE[token, expert]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("null_id", IDS)
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_critical_values_select_as_p_values_do(calibration, rng, null_id, masked):
    null = fitted(null_id, calibration)
    calibration = dataclasses.replace(calibration, nulls={null_id: null})
    logits_TE = torch.from_numpy(1.5 * rng.standard_normal((500, EXPERTS))).float()
    logits_TE[rng.random((500, EXPERTS)) < masked] = -math.inf
    hidden_TH = torch.from_numpy(rng.standard_normal((500, HIDDEN), np.float32))
    for alpha in (0.05, 0.3):
        strategy = BH.against(null_id, max_k=16, alpha=alpha)
        scorer = ExpertScorer.of(strategy, calibration)
        assert scorer.score == null.score
        inputs = scorer(RouterInputs(1, logits_TE, hidden_TH, rule=calibration.sample.rule))
        fast = strategy.ranker(calibration, EXPERTS)(inputs, inputs.softmax_TE)
        slow = MultipleTesting.ranker(strategy, calibration, EXPERTS)(inputs, inputs.softmax_TE)
        assert torch.equal(fast.rejected_T, slow.rejected_T)
        assert torch.equal(fast.count_T, slow.count_T)
        assert torch.equal(fast.order_TK, slow.order_TK)
        assert (fast.rejected_T > 0).any()


def test_an_id_without_a_score_takes_the_one_that_keeps_most(calibration, rng):
    null = fitted("needed_e1e4", calibration)
    assert null.score == "norm"
    assert null.id == "needed_e1e4"
    assert null.hypothesis.endswith("(KL); ranked by its weight times its predicted output norm")
    assert null.diagnostics(0)["score"] == "norm"
    explicit = fitted("needed_e1e4_norm", calibration)
    assert torch.equal(null.draw_Ln, explicit.draw_Ln)
    assert null.draw_Ln.shape[1] > 1
    kept = {
        score: mean_kept(fitted(f"needed_e1e4_{score}", calibration), calibration.toggles,
                         calibration.outputs)
        for score in FREE_SCORES
    }  # fmt: skip
    assert kept["norm"] > 1.2 * kept["probability"]
    without_norms = simulated(rng, exponent=0.0)  # norms have no effect
    assert fitted("needed_e1e4", without_norms).score == "probability"
    assert fit_null("needed_e1e4", calibration.sample, calibration.toggles).score == "probability"


def test_each_half_of_the_documents_is_counted_with_what_the_other_fits(calibration):
    """The choice by its definition."""
    toggles, outputs = calibration.toggles, calibration.outputs
    documents = sorted(set(toggles.document_P.tolist()))
    halves = [toggles.of_documents(documents[0::2]), toggles.of_documents(documents[1::2])]
    totals = {}
    for score in FREE_SCORES:
        totals[score] = 0.0
        for fit, count in (halves, halves[::-1]):
            null = fit_null(f"needed_e1e4_{score}", calibration.sample, fit, None, outputs)
            totals[score] += mean_kept(null, count, outputs)
    best = max(FREE_SCORES, key=lambda score: totals[score])
    assert choose_score(toggles, outputs, NeededId(EPSILON), EPSILON) == best
    one = toggles.of_documents(documents[:1])
    assert choose_score(one, outputs, NeededId(EPSILON), EPSILON) == "probability"


@pytest.mark.parametrize("exponent", [1.0, 0.0])
def test_what_a_score_gains_is_said_where_it_gains(rng, exponent):
    made = simulated(rng, exponent=exponent)
    toggles, outputs = made.toggles, made.outputs
    documents = sorted(set(toggles.document_P.tolist()))
    fit, test = (toggles.of_documents(documents[part::2]) for part in (0, 1))
    null = fit_null("needed_e1e4_norm", made.sample, fit, None, outputs)
    verification = Verification(made.sample, fit, outputs, null, 0.05, 16, None, [], 0.95, 500, rng)
    table = verification.scores(Judged.of(null, test, outputs))
    assert table["score"].unique().tolist() == list(FREE_SCORES)
    assert table.loc[table["chosen"], "score"].unique().tolist() == ["norm"]
    for row in table[np.isclose(table["alpha"], 0.05)].itertuples():
        one = fit_null(f"needed_e1e4_{row.score}", made.sample, fit, None, outputs)
        rates = held_out_fdr(
            one, test, [0.05], outputs=outputs, confidence=0.95, resamples=100, rng=rng
        )
        expected = rates[rates["layer"] == "all"].iloc[0]
        assert row.mean_rejected == pytest.approx(expected["mean_rejected"])
        assert row.fdr == pytest.approx(expected["fdr"])
        base = table[(table["score"] == "probability") & (table["alpha"] == row.alpha)]
        assert row.ratio == pytest.approx(row.mean_rejected / base["mean_rejected"].item())
        assert row.ratio_low <= row.ratio <= row.ratio_high + 1e-9
    said = findings_needed.scores(table)
    if exponent:
        assert said.verdict == "more"
        assert "BH then keeps" in said.text
        assert "times as many" in said.text
    else:
        assert said.verdict in ("fewer", "not shown")
    chosen = table.assign(chosen=table["score"] == "probability")
    plain = findings_needed.scores(chosen)
    assert plain.verdict == "probability"
    assert "by probability times mean norm and " in plain.text
    nothing = verification._ratio(np.ones(4), np.zeros(4), np.arange(4))
    assert np.isnan(nothing).all()
    none = table.assign(ratio=np.nan, ratio_low=np.nan, ratio_high=np.nan)
    assert "A ratio cannot be given; the false" in findings_needed.scores(none).text


@pytest.mark.parametrize("null_id", [*IDS, "needed_e1e4", "needed_compensated"])
def test_a_saved_null_is_the_same(tmp_path, calibration, null_id):
    null = fitted(null_id, calibration)
    save_null(null, calibration.sample, tmp_path / "null.safetensors", calibration.toggles)
    loaded = load_null(tmp_path / "null.safetensors", calibration.sample, calibration.toggles)
    assert (loaded.id, loaded.score, loaded.compensated) == (null.id, null.score, null.compensated)
    assert all(torch.equal(loaded.tensors()[key], value) for key, value in null.tensors().items())


def test_a_compensated_null_has_the_effect_of_the_substitute(calibration):
    plain, compensated = (
        fitted(f"needed_e1e4_probability{words}", calibration) for words in ("", "_compensated")
    )
    assert (compensated.needed_L < plain.needed_L).all()
    assert "replacing the expert by its mean output" in compensated.hypothesis


def test_diagnostics_describe_the_score(calibration):
    table = diagnose(fitted("needed_e1e4_norm", calibration), calibration)
    assert (table["score"] == "norm").all()
    assert table["centre"].notna().all()
    assert table["tail_upper_to_lower_permuted"].isna().all()
    exact = diagnose(fitted("needed_e1e4_exact_norm", calibration), calibration)
    assert exact["centre"].isna().all()
    assert (exact["n"] > 0).all()


def test_the_held_out_rate_counts_the_ranks_of_the_score(calibration, rng):
    documents = sorted(set(calibration.toggles.document_P.tolist()))
    fit, test = (calibration.toggles.of_documents(documents[start::2]) for start in (0, 1))
    outputs = calibration.outputs
    null = fit_null("needed_e1e4_norm", calibration.sample, fit, None, outputs)
    table = held_out_fdr(null, test, [0.2], outputs=outputs, confidence=0.9, resamples=200, rng=rng)
    score_LTE = statistics(test, outputs, null.name, null.score)
    rates, kept = [], []
    for layer in range(2):
        for token in range(score_LTE.shape[1]):
            inputs = RouterInputs(
                layer, test.weight_LTE[layer, token : token + 1].log(),
                score_TE=score_LTE[layer, token : token + 1],
            )  # fmt: skip
            p_E, order_E = (part[0].tolist() for part in null.sorted_p_values(inputs))
            passing = [i + 1 for i, p in enumerate(p_E) if p <= (i + 1) / EXPERTS * 0.2]
            chosen = set(order_E[: max(passing, default=0)])
            here_P = (test.layer_P == layer) & (test.token_P == token)
            false = sum(
                float(test.sampling_weight_P[pair])
                for pair in here_P.nonzero()[:, 0].tolist()
                if int(test.expert_P[pair]) in chosen and float(test.kl_P[pair]) < EPSILON
            )
            rates.append(false / max(1, len(chosen)))
            kept.append(len(chosen))
    row = table[table["layer"] == "all"].iloc[0]
    assert row["mean_rejected"] == pytest.approx(np.mean(kept))
    assert row["fdr"] == pytest.approx(np.mean(rates))


def test_a_score_that_inputs_lack_is_refused(calibration):
    null = fitted("needed_e1e4_norm", calibration)
    inputs = RouterInputs(0, calibration.sample.logits_LTE[0])
    with pytest.raises(InputError, match="tests the score 'norm'; allowed: router inputs that are"):
        null.p_values(inputs)
    with pytest.raises(InputError, match="null 'needed_norm': score 'norm' needs the outputs"):
        fit_null("needed_norm", calibration.sample, calibration.toggles)
