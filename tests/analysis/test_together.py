"""Joint removals against their parts, and orders of experts, where the truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moe_routing.analysis.together import estimate, headroom, joint_removals
from moe_routing.statistics.bootstrap import bootstrap_items, studentised_interval

TOKENS, LAYERS = 90, 3
DOCUMENT_T = np.arange(TOKENS) // 3
SETTINGS = {"confidence": 0.95, "resamples": 300}


def joint_table(rng, factor=1.0, across=1.0, silent=()):
    """Return joint removals whose KL is ``factor`` times the sum of single ones in each layer."""
    rows = []
    for token in range(TOKENS):
        total, layers = 0.0, 0.0
        for layer in range(LAYERS):
            single = 0.0 if layer in silent else float(np.exp(rng.normal(-6, 0.5)))
            alone = factor * single * np.exp(rng.normal(0, 0.1))
            rows.append((token, "bh", 0, str(layer), 0 if layer in silent else 4, alone, single))
            total, layers = total + single, layers + alone
        count = 4 * (LAYERS - len(silent))
        rows.append((token, "bh", 0, "all", count, across * layers, total))
        rows.append((token, "router", 2, "all", 9, 99.0, 99.0))  # another order
    columns = ["token", "order", "k", "layer", "removed", "kl", "sum_kl"]
    return pd.DataFrame(rows, columns=columns).assign(loss_change=0.0)


@pytest.mark.parametrize(("factor", "across"), [(1.5, 2.0), (1.0, 1.0), (0.5, 0.5)])
def test_the_ratio_of_joint_to_single_effects_is_found(rng, factor, across):
    rows = joint_table(rng, factor, across)
    table = joint_removals(rows, DOCUMENT_T, **SETTINGS, rng=rng).set_index("layer")
    assert table.index.tolist() == ["0", "1", "2", "all"]
    for name, row in table.iterrows():
        own = rows[(rows["order"] == "bh") & (rows["layer"] == name)]
        assert row["kl"] == pytest.approx(own["kl"].mean())
        assert row["sum_kl"] == pytest.approx(own["sum_kl"].mean())
        assert row["ratio"] == pytest.approx(own["kl"].sum() / own["sum_kl"].sum())
        assert row["ratio_low"] < row["ratio"] < row["ratio_high"]
        assert (row["n_tokens"], row["n_documents"]) == (TOKENS, 30)
    every = table.loc["all"]
    assert every["mean_removed"] == 12
    assert every["layers_ratio"] == pytest.approx(across)
    assert table["layers_ratio"].isna().tolist() == [True, True, True, False]
    assert every["ratio_low"] < factor * across * 1.01
    assert (every["ratio_low"] > 1) == (factor > 1)
    assert (every["ratio_high"] < 1) == (factor < 1)


def test_a_layer_in_which_nothing_is_removed_has_no_ratio(rng):
    table = joint_removals(joint_table(rng, silent=(1,)), DOCUMENT_T, **SETTINGS, rng=rng)
    row = table.set_index("layer").loc["1"]
    assert row["kl"] == row["kl_high"] == row["mean_removed"] == 0
    assert np.isnan(row["ratio"])


def order_table(rng, noise):
    """Return the KL of four orders: that of the measured effects times noise of other sizes."""
    rows = []
    for token in range(TOKENS):
        for k in (2, 3):
            best = float(np.exp(rng.normal(-4 - k, 0.4)))
            for order, size in {"effect": 0.0, **noise}.items():
                kl = best * np.exp(size + abs(size) * rng.normal(0, 0.2))
                rows.append((token, order, k, "all", 30, kl, kl))
            rows.append((token, "bh", 0, "all", 9, 99.0, 99.0))
    columns = ["token", "order", "k", "layer", "removed", "kl", "sum_kl"]
    return pd.DataFrame(rows, columns=columns).assign(loss_change=lambda x: -x["kl"])


def test_orders_are_compared_on_the_same_tokens(rng):
    rows = order_table(rng, {"exact_norm": 0.2, "norm": 0.5, "router": 0.8})
    table = headroom(rows, DOCUMENT_T, **SETTINGS, rng=rng)
    assert table["k"].tolist() == [2] * 4 + [3] * 4
    table = table.set_index(["k", "order"])
    mean = rows.groupby(["k", "order"])["kl"].mean()
    for k in (2, 3):
        router, best = mean[k, "router"], mean[k, "effect"]
        for order in ("router", "norm", "exact_norm", "effect"):
            row = table.loc[(k, order)]
            assert row["kl"] == pytest.approx(mean[k, order])
            assert row["loss_change"] == pytest.approx(-mean[k, order])
            assert row["over_router"] == pytest.approx(mean[k, order] - router)
            assert row["closed"] == pytest.approx((router - mean[k, order]) / (router - best))
        norm = table.loc[(k, "norm")]
        assert norm["over_router_high"] < 0
        assert norm["closed_low"] < norm["closed"] < norm["closed_high"]
        assert table.loc[(k, "effect"), "closed_low"] == pytest.approx(1)


def test_without_room_nothing_is_closed(rng):
    """The measured effects are no better than the router."""
    rows = order_table(rng, {"exact_norm": 0.1, "norm": 0.1, "router": -0.3})
    table = headroom(rows, DOCUMENT_T, **SETTINGS, rng=rng)
    assert table["closed"].isna().all()
    assert (table.loc[table["order"] == "effect", "over_router"] > 0).all()


def test_an_estimate_is_the_studentised_bootstrap(rng):
    value_N, unit_N = rng.random((2, TOKENS))
    found = estimate("x", value_N, unit_N, DOCUMENT_T, **SETTINGS, rng=np.random.default_rng(3))
    boot = bootstrap_items(value_N, unit_N, DOCUMENT_T, resamples=300, rng=np.random.default_rng(3))
    (low,), (high,) = studentised_interval(boot, 0.95)
    assert found == {"x": boot.ratio_S[0], "x_low": low, "x_high": high}
