"""Figures of BH stay legible with as many nulls as the default study has."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moe_routing.figures.bh import (
    alpha_sensitivity,
    bh_vs_topk,
    counts_distribution,
    heatmap,
    quality_vs_experts,
    reduction,
    saturation_curve,
)
from moe_routing.figures.series import MARKERS, paired_panels
from moe_routing.figures.style import use_style

SEVEN = (
    "needed", "needed_e1e4", "needed_e1e3", "within_token", "pooled", "random_direction",
    "unselected",
)  # fmt: skip
ALPHAS, CAPS, LAYERS = (0.01, 0.05, 0.1), (8, 64), 3


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def results(nulls):
    """Return rows of ``bh_routing_results.csv``, each null with as much top-k."""
    rows = [
        {"null": null, "kind": kind, "max_k": cap, "alpha": alpha, "mean_experts": used}
        for null in nulls
        for cap in CAPS
        for kind, alpha, used in [("topk", np.nan, cap), *(("bh", a, 1 + 40 * a) for a in ALPHAS)]
    ]
    table = pd.DataFrame(rows)
    table["reduction_pct"] = 100 * (1 - table["mean_experts"] / table["max_k"])
    table["nats_vs_baseline"] = 1 / table["mean_experts"]
    table["token_perplexity"] = 100 + table["nats_vs_baseline"]
    for name in ("mean_experts", "nats_vs_baseline"):
        table[f"{name}_low"], table[f"{name}_high"] = table[name] * 0.9, table[name] * 1.1
    return table.assign(dataset="wikipedia", window=256, n_tokens=4000, n_documents=30)


def static_curve():
    table = results(["none"]).query("kind == 'topk'").assign(k=CAPS)
    return table.drop(columns=["null", "kind"])


def counts(nulls):
    rows = [
        {"null": null, "max_k": 64, "alpha": alpha, "layer": layer, "experts": experts,
         "proportion": 0.25}
        for null in nulls for alpha in ALPHAS for layer in range(LAYERS)
        for experts in (1, 2, 8, 64)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def saturation(nulls):
    rows = [
        {"null": null, "alpha": alpha, "max_k": cap, "mean_experts": np.log2(cap) + 1,
         "measured": np.nan, "saturation_point": 4}
        for null in nulls for alpha in ALPHAS for cap in range(1, 65)
    ]  # fmt: skip
    return pd.DataFrame(rows)


FIGURES = {
    "counts": lambda nulls: counts_distribution(counts(nulls), results(nulls)),
    "alpha": lambda nulls: alpha_sensitivity(results(nulls)),
    "quality": lambda nulls: quality_vs_experts(results(nulls), static_curve()),
    "topk": lambda nulls: bh_vs_topk(results(nulls)),
    "heatmap": lambda nulls: heatmap(results(nulls)),
    "saturation": lambda nulls: saturation_curve(saturation(nulls), results(nulls)),
    "reduction": lambda nulls: reduction(results(nulls)),
}


@cache
def drawn(name):
    return FIGURES[name](SEVEN)


@pytest.mark.parametrize("name", FIGURES)
def test_titles_and_labels_do_not_overlap(name):
    figure = drawn(name)
    figure.draw_without_rendering()
    axes = [axis for axis in figure.axes if axis.axison]
    texts = [text for axis in axes for text in (axis.title, axis.xaxis.label, axis.yaxis.label)]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    for (first, box), (second, other) in combinations(boxes, 2):
        assert not box.overlaps(other), f"{first!r} on {second!r}"
    for axis in axes:
        labels = [x for x in axis.get_xticklabels() if x.get_text()]
        ticks = [(x.get_text(), x.get_window_extent()) for x in labels]
        for (first, box), (second, other) in combinations(ticks, 2):
            assert not box.overlaps(other), f"{first!r} on {second!r}"


@pytest.mark.parametrize("name", FIGURES)
def test_every_null_is_named(name):
    figure = drawn(name)
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    said = "\n".join([axis.get_title() for axis in figure.axes] + legends)
    for words in ("needed, epsilon 10⁻⁴", "needed, epsilon 10⁻³", "within token", "unselected"):
        assert words in said


def test_the_legend_of_quality_has_each_null_and_each_level_once():
    figure = drawn("quality")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels)) == len(SEVEN) + len(ALPHAS) + 1


def test_there_are_shapes_for_any_number_of_nulls():
    figure = FIGURES["quality"]([f"null_{number}" for number in range(len(MARKERS) + 2)])
    assert len(figure.legends[0].get_texts()) == len(MARKERS) + 2 + len(ALPHAS) + 1


def test_pairs_wrap_after_four_and_share_their_axes():
    figure, pairs = paired_panels(list("abcdefg"), height=2.0)
    assert len(figure.axes) == 16
    assert sum(axis.axison for axis in figure.axes) == 14
    for upper, lower in pairs.values():
        assert upper.get_shared_y_axes().joined(upper, pairs["a"][0])
        assert lower.get_shared_y_axes().joined(lower, pairs["a"][1])
        assert not upper.get_shared_y_axes().joined(upper, lower)
