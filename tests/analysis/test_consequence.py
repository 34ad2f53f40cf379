"""The tables of the consequence law, on the embedded model's own toggles."""

from __future__ import annotations

import numpy as np
import pytest

from moe_routing.analysis.consequence import (
    COMPENSATED,
    OMITTED,
    correlation_table,
    law_table,
    removals_table,
)


@pytest.fixture(scope="module")
def removals(calibration):
    return removals_table(calibration.toggles, calibration.outputs)


def test_one_row_per_removal_and_substitute(removals, calibration):
    toggles = calibration.toggles
    removed = (toggles.rank_P < toggles.rule.top_k).nonzero()[:, 0].tolist()
    assert removals["dropped"].tolist() == [
        *[OMITTED] * len(removed), *[COMPENSATED] * len(removed)
    ]  # fmt: skip
    for row, pair in ((0, removed[0]), (len(removed) - 1, removed[-1])):
        layer, token = int(toggles.layer_P[pair]), int(toggles.token_P[pair])
        expert = int(toggles.expert_P[pair])
        own = removals.iloc[row]
        assert (own["layer"], own["token"], own["expert"]) == (layer, token, expert)
        assert own["weight"] == pytest.approx(float(toggles.weight_P[pair]))
        assert own["norm"] == pytest.approx(float(toggles.norm_LTE[layer, token, expert]))
        assert own["kl"] == float(toggles.kl_P[pair])
        other = removals.iloc[len(removed) + row]
        assert other["norm"] == pytest.approx(float(toggles.deviation_LTE[layer, token, expert]))
        assert other["kl"] == float(toggles.compensated_kl_P[pair])
        log_norm = float(
            calibration.outputs.slope_LEH[layer, expert] @ toggles.hidden_LTH[layer, token]
            + calibration.outputs.offset_LE[layer, expert]
        )
        assert own["predicted"] == pytest.approx(own["weight"] * np.exp(log_norm), rel=1e-4)


def test_law_holds_on_the_embedded_model(removals, calibration):
    law = law_table(removals)
    assert len(law) == 2 * calibration.sample.num_layers
    plain = law[law["dropped"] == OMITTED]
    assert plain["weight_slope"].between(1.7, 2.4).all()
    assert plain["norm_slope"].between(1.5, 2.6).all()
    assert plain["r2"].min() > 0.8
    assert plain["token_share"].between(0, 1).all()


def test_the_sign_of_the_realised_loss_is_not_predicted_but_the_effect_is(removals):
    table = correlation_table(removals)
    means = table[(table["layer"] == "all") & (table["dropped"] == OMITTED)]
    value = means.set_index(["predictor", "effect"])["spearman"]
    assert abs(value["weight", "loss"]) < 0.15
    assert value["weight", "kl"] < value["weight_norm", "kl"]
    assert value["weight_norm", "kl"] > 0.85
    assert means["lower_loss"].between(0.4, 0.6).all()
