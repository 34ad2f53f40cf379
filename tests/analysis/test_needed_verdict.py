"""What the validity analysis says of ``needed``, where the truth is planted both ways."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from held_out_toggles import with_dead, write_held_out_toggles
from planted_toggles import EXPERTS, LAYERS, TOKENS, simulate

from moe_routing.analysis.held_out import Judged, fewest_selected, rejections
from moe_routing.analysis.needed import CALIBRATIONS, PROCEDURES, Verification
from moe_routing.evaluation.held_out_files import HeldOutFiles
from moe_routing.reporting import findings_needed
from moe_routing.routing.nulls import fit_null
from moe_routing.routing.procedures import bh_levels
from moe_routing.routing.toggles import Toggles

HALF = TOKENS // 4
"""Documents of each half; there are two tokens per document."""


@pytest.fixture(scope="module")
def halves():
    """Toggles to fit on and to test on, from one law."""
    sample, toggles, *_ = simulate()
    parts = (range(HALF), range(HALF, 2 * HALF))
    return sample, *(toggles.of_documents(part) for part in parts)


@pytest.fixture
def verify(halves, tmp_path):
    """Return a maker of verifications, of toggles to fit on and to test on."""

    def make(fit=None, test=None, seed=1):
        sample, default_fit, default_test = halves
        fit, test = fit or default_fit, test or default_test
        write_held_out_toggles(tmp_path, test, ["calibration", "lambada"])
        with_dead(fit, 2).save(HeldOutFiles(tmp_path).dead("calibration"))
        return Verification(
            sample,
            fit,
            None,
            fit_null("needed_e1e4_probability", sample, fit),
            0.05,
            4,
            HeldOutFiles(tmp_path),
            ["calibration", "lambada"],
            0.95,
            200,
            np.random.default_rng(seed),
        )

    return make


def judge(made, text="calibration"):
    return Judged.of(made.null, Toggles.load(made.files.toggles(text)), made.outputs)


def test_a_calibration_of_the_same_law_keeps_alpha_and_another_does_not(verify, halves):
    good = verify()
    rates = good.false_discoveries({"calibration": judge(good)})
    (said,) = findings_needed.held_out(rates)
    assert said.verdict in ("kept", "exceptions")
    # Calibrated where every effect is ten times as large, most experts seem to be needed.
    bad = verify(fit=replace(halves[1], kl_P=10 * halves[1].kl_P))
    (said,) = findings_needed.held_out(bad.false_discoveries({"calibration": judge(bad)}))
    assert said.verdict == "exceeded"
    assert "Over all layers it is above alpha at 0.01, 0.05 and 0.1." in said.text


def test_every_procedure_and_part_has_its_rows(verify):
    made = verify()
    rates = made.false_discoveries({text: judge(made, text) for text in made.texts})
    assert set(rates["text"]) == {"calibration", "lambada"}
    assert set(rates["part"]) == {"rule", "routed"}
    at = rates[(rates["layer"] == "all") & (rates["part"] == "rule") & (rates["text"] == "lambada")]
    by_name = at.set_index(["procedure", "alpha"])["mean_rejected"]
    assert by_name["by", 0.2] < by_name["bh", 0.2]
    assert by_name["block_exact", 0.2] < by_name["bh", 0.2]
    for procedure in PROCEDURES:
        for alpha, rows in at[at["procedure"] == procedure.name].groupby("alpha"):
            assert rows["fewest"].item() == procedure.fewest(made.null, alpha) <= 4


def test_levels_below_the_resolution_are_left_out_and_said_so(verify, halves):
    made = verify(fit=halves[1].of_documents(range(40)))  # 80 tokens, 1,280 pairs
    rates = made.false_discoveries({"calibration": judge(made)})
    kept = rates[rates["procedure"] == "by"]["alpha"].unique().tolist()
    assert 0.01 not in kept
    assert 0.2 in kept
    few = verify(fit=halves[1].of_documents(range(2)))
    (said,) = findings_needed.held_out(few.false_discoveries({"calibration": judge(few)}))
    assert said.text.endswith("Alpha 0.01 and 0.05 is below the resolution of the calibration.")


def test_the_fewest_experts_are_those_that_a_loop_finds(halves):
    sample, fit, _ = halves
    null = fit_null("needed_e1e4_probability", sample, fit.of_documents(range(8)))
    for used in (null, null.block_exact()):
        p_N = used.survival(0, torch.full((1, EXPERTS), 1.1))[0]  # above every draw
        for alpha in (0.01, 0.05, 0.1, 0.3):
            level_E = bh_levels(EXPERTS, alpha)
            possible = [k + 1 for k in range(EXPERTS) if float(p_N[0]) <= float(level_E[k])]
            assert fewest_selected(used, level_E) == min(possible, default=EXPERTS + 1)


def test_resampled_documents_count_as_often_as_they_are_drawn(verify):
    """Against toggles in which the pairs of a document are repeated."""
    made, twin = verify(seed=3), np.random.default_rng(3)
    own = judge(made)
    table = made.resampled(own)
    assert table["calibration"].nunique() == CALIBRATIONS
    drawn = twin.multinomial(HALF, np.full(HALF, 1 / HALF))
    fit = made.toggles
    parts = [fit.of_documents([d]) for d, times in enumerate(drawn) for _ in range(times)]
    pairs = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in fit.TENSORS if name.endswith("_P") and name != "document_P"
    }  # fmt: skip
    pairs["document_P"] = torch.cat(
        [torch.full_like(part.document_P, number) for number, part in enumerate(parts)]
    )
    tokens = {
        name: torch.cat([getattr(part, name) for part in parts], dim=1)
        for name in fit.TENSORS if "_LT" in name
    }  # fmt: skip
    null = fit_null("needed_e1e4_probability", made.sample, replace(fit, **pairs, **tokens))
    count_LT = rejections(own.p_values(null), bh_levels(EXPERTS, 0.1))
    first = table[(table["calibration"] == 0) & np.isclose(table["alpha"], 0.1)]
    assert first["mean_rejected"].iloc[0] == pytest.approx(float(count_LT[0].double().mean()))
    assert first["fdr"].iloc[1] == pytest.approx(float(own.proportion(count_LT)[1].mean()))
    rates = table[table["layer"] == "all"].groupby("alpha")["fdr"]
    assert (rates.max() > rates.min()).all()


@pytest.mark.parametrize(("sharper", "verdict"), [(1.0, "kept"), (1.6, "exceeded")])
def test_where_a_layer_is_dead_nothing_is_needed(verify, halves, sharper, verdict):
    """Selections are as rare as alpha, unless test tokens have larger statistics than draws."""
    test = replace(halves[2], logits_LTE=sharper * halves[2].logits_LTE)
    made = verify(test=test)
    table = made.dead_layers(judge(made))
    assert set(table["procedure"]) == {"bh", "by"}
    assert table["score"].unique().tolist() == ["probability"]
    (said,) = findings_needed.dead_layers(table)
    assert said.verdict == verdict
    # The draws are all statistics of the calibration's tokens, whatever they change.
    p = pd.Series(made.toggles.weight_P.tolist())
    weight = pd.Series(made.toggles.sampling_weight_P.tolist())
    layer = pd.Series(made.toggles.layer_P.tolist())
    counts = []
    for g_E in test.weight_LTE[1].sort(descending=True).values[:40].tolist():
        above = [float(weight[(layer == 1) & (p >= np.float32(g))].sum()) for g in g_E]
        total = float(weight[layer == 1].sum())
        own = made.toggles.rank_weight_E.tolist()
        p_E = [(own[k] + above[k]) / (own[k] + total) for k in range(EXPERTS)]
        counts.append(max((k + 1 for k in range(EXPERTS) if p_E[k] <= (k + 1) * 0.2 / EXPERTS),
                          default=0))  # fmt: skip
    part = judge(made)
    null = made._judged(
        made.toggles, made.toggles.weight_LTE, torch.ones_like(made.toggles.layer_P).bool()
    )
    found_LT = PROCEDURES[0].counts(null, part, 1)[0.2]
    assert found_LT[1, :40].tolist() == counts


def test_dead_experts_are_among_those_that_are_not_needed(verify):
    made = verify()
    table = made.dead_experts()
    assert (table["dead"] == 2 / EXPERTS).all()
    rule = table[(table["procedure"] == "bh") & (table["part"] == "rule")]
    assert (rule["dead_slots"] > 0).any()
    everything = rule[rule["layer"] == "all"]
    assert (everything["dead_slots"] <= everything["fdr"] + 0.03).all()  # lower ranks are sampled
    assert findings_needed.dead_experts(table).verdict in ("kept", "exceptions")
    # A null that does not know of the dead keeps them.
    verify()
    living = made.toggles
    living.save(made.files.dead("calibration"))
    unaware = findings_needed.dead_experts(made.dead_experts())
    assert unaware.verdict == "exceeded"
    assert "Over all layers it is above alpha at " in unaware.text


def test_dead_slots_equal_a_loop(verify):
    made = verify()
    table = made.dead_experts()
    test, fit = (Toggles.load(made.files.dead(part)) for part in ("held_out", "calibration"))
    null = fit_null("needed_e1e4_probability", made.sample, fit)
    own = Judged.of(null, test, None)
    count_LT = rejections(own.p_values(null), bh_levels(EXPERTS, 0.1))
    shares = []
    for token, count in enumerate(count_LT[1].tolist()):
        order = test.weight_LTE[1, token].argsort(descending=True)[:count].tolist()
        shares.append(sum(expert < 2 for expert in order) / max(1, count))
    row = table[(table["procedure"] == "bh") & (table["part"] == "rule") & (table["layer"] == "1")]
    found = row.loc[np.isclose(row["alpha"], 0.1), "dead_slots"].item()
    assert found == pytest.approx(np.mean(shares))


@pytest.mark.parametrize(("planted", "verdict"), [(True, "named"), (False, "none")])
def test_an_expert_that_is_never_needed_is_named(verify, halves, planted, verdict):
    test = halves[2]
    if planted:
        idle_P = (test.expert_P == 5) & (test.layer_P == 1)
        test = replace(test, kl_P=torch.where(idle_P, 0.0, test.kl_P))
    else:  # every selected expert is needed
        test = replace(test, kl_P=torch.ones_like(test.kl_P))
    made = verify(test=test)
    table = made.worst_experts(judge(made))
    assert table["n_experts"].iloc[0] == LAYERS * EXPERTS
    assert (table["toggled"] <= table["slots"]).all()
    said = findings_needed.worst_experts(table)
    assert said.verdict == verdict
    if planted:
        worst = table.iloc[0]
        assert (worst["layer"], worst["expert"], worst["not_needed"]) == (1, 5, 1.0)
        assert "expert 5 of layer 1 (100 %)" in said.text
        assert worst["joint_low"] < worst["low"]
