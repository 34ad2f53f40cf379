"""The figures of matched budgets show the numbers of their tables."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moe_routing.figures.budgets import budgets, unique_experts
from moe_routing.figures.series import line_style
from moe_routing.figures.style import use_style
from moe_routing.statistics.rules import with_kinds

LOSS = {"regular_k2": 0.13, "regular_k3": 0.066, "regular_k4": 0.037, "absolute_k8_b2": 0.08,
        "absolute_k8_b3": 0.04, "absolute_k8_b3_compensated": 0.02,
        "certified_k8_m001": 0.01}  # fmt: skip
EXPERTS = {"regular_k2": 2.0, "regular_k3": 3.0, "regular_k4": 4.0, "absolute_k8_b2": 2.05,
           "absolute_k8_b3": 3.05, "absolute_k8_b3_compensated": 3.04,
           "certified_k8_m001": 2.9}  # fmt: skip
METRIC = {"wikipedia": "nats_per_token", "hellaswag": "accuracy_norm"}


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def table(scale="as is"):
    rows = [
        {"strategy": name, "dataset": dataset, "scale": scale, "metric": metric, "n_items": 120,
         "mean_experts": EXPERTS[name], "loss_over_stock": loss, "low": loss - 0.002,
         "high": loss + 0.002, "value": 0.35 - loss}
        for dataset, metric in METRIC.items()
        for name, loss in LOSS.items()
    ]  # fmt: skip
    return with_kinds(pd.DataFrame(rows), "softmax")


def lines(axis):
    return {
        container.get_label(): container.lines[0]
        for container in axis.containers
        if container.get_label()
    }


def test_a_panel_per_data_set_and_a_line_per_rule_on_a_linear_axis():
    figure = budgets(table(), 8, 0.01)
    drawn = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in drawn] == ["Wikipedia (n = 120)", "HellaSwag (n = 120)"]
    for axis in drawn:
        assert axis.get_xscale() == "linear"
        x, y = (np.asarray(values) for values in lines(axis)["One threshold"].get_data())
        assert list(x) == [2.05, 3.05]
        assert list(y) == [0.08, 0.04]
        x, y = (np.asarray(values) for values in lines(axis)["Fixed k"].get_data())
        assert (list(x), list(y)) == ([2, 3, 4], [0.13, 0.066, 0.037])


def test_fixed_numbers_end_at_stock_and_compensated_rules_are_hollow():
    axis = budgets(table(), 8, 0.01).axes[0]
    ends = [line.get_xydata()[-1].tolist() for line in axis.get_lines()]
    assert [8.0, 0.0] in ends
    drawn = lines(axis)
    plain, hollow = drawn["One threshold"], drawn["One threshold, compensated"]
    assert plain.get_color() == hollow.get_color() == plain.get_markerfacecolor()
    assert hollow.get_markerfacecolor() == "white"
    looks = {(line.get_color(), line.get_markerfacecolor()) for line in drawn.values()}
    assert len(looks) == len(drawn)


def test_a_rule_looks_the_same_at_either_scale():
    """Also where the other scale has fewer rules."""
    fitted = table("fitted")
    fitted = fitted[fitted["strategy"].isin(["regular_k3", "absolute_k8_b3_compensated"])]
    both = pd.concat([table(), fitted])
    looks = [
        {
            name: (line.get_color(), line.get_marker(), line.get_linestyle())
            for name, line in lines(budgets(both, 8, 0.01, scale).axes[0]).items()
        }
        for scale in ("as is", "fitted")
    ]
    assert set(looks[1]) == {"Fixed k", "One threshold, compensated"}
    assert looks[1].items() <= looks[0].items()


def test_no_two_of_many_lines_look_alike():
    looks = [line_style(index) for index in range(40)]
    assert len({tuple(map(str, one.values())) for one in looks}) == len(looks)
    assert len({(one["color"], one["marker"]) for one in looks}) == len(looks)


def test_the_margin_is_in_nats_and_guessing_in_accuracy():
    """The stock model is right on 35 % of the items, 10 points above guessing."""
    figure = budgets(table(), 8, 0.01)
    first, second = (
        {line.get_label(): line.get_ydata()[0] for line in axis.get_lines()}
        for axis in figure.axes[:2]
    )
    assert first["Margin"] == 0.01
    assert "Guessing" not in first
    assert second["Guessing"] == pytest.approx(0.10)
    assert "Margin" not in second


def test_distinct_experts_are_means_over_layers():
    rows = [
        {"strategy": name, "batch_size": size, "layer": layer, "unique_experts": size + layer}
        for name in ("stock", "regular_k2")
        for size in (1, 8, 64)
        for layer in (0, 2)
    ]
    names = {"stock": "stock", "regular_k2": "fixed k"}
    axis = unique_experts(pd.DataFrame(rows), names).axes[0]
    assert [line.get_label() for line in axis.get_lines()] == ["Stock (2.0)", "Fixed k (2.0)"]
    assert list(axis.get_lines()[0].get_ydata()) == [2, 9, 65]


def test_the_legend_of_distinct_experts_has_the_order_of_the_lines():
    rows = [
        {"strategy": name, "batch_size": size, "layer": 0, "unique_experts": size * weight}
        for name, weight in (("regular_k2", 1), ("stock", 3), ("regular_k4", 2))
        for size in (1, 8)
    ]
    names = {"stock": "stock", "regular_k2": "two", "regular_k4": "four"}
    axis = unique_experts(pd.DataFrame(rows), names).axes[0]
    labels = [line.get_label() for line in axis.get_lines()]
    assert labels == ["Stock (3.0)", "Four (2.0)", "Two (1.0)"]
