"""The figure of the levers shows the losses of its table."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from planted_levers import CERTIFIED, levers

from moe_routing.figures import levers as figure_of
from moe_routing.figures.style import use_style
from moe_routing.statistics.lever_kinds import with_kinds

DATASETS = ("wikipedia", "hellaswag")


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def draw(**planted):
    table = with_kinds(levers(**planted), "softmax")
    return table, figure_of.levers(table, 0.01, 8)


def lines(axis):
    return {
        container.get_label(): container.lines[0]
        for container in axis.containers
        if container.get_label()
    }


def test_a_row_per_data_set_in_nats_per_token_and_a_column_per_scale():
    table, figure = draw(scaled_at=(2, 3))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        "Wikipedia (n = 120), as is", "Wikipedia (n = 120), at fitted scale",
        "HellaSwag (n = 120), as is", "HellaSwag (n = 120), at fitted scale",
    ]  # fmt: skip
    places = [(name, scale) for name in DATASETS for scale in ("unscaled", "scaled")]
    for axis, (name, scale) in zip(figure.axes, places, strict=True):
        rows = table[(table["dataset"] == name) & (table["scale"] == scale)]
        for kind, own in rows.groupby("kind", sort=False):
            label = CERTIFIED if kind.rule == "certified" else kind.words
            x, y = (np.asarray(values) for values in lines(axis)[label].get_data())
            expected = own[own["mean_experts"] >= 1.8].sort_values("mean_experts")
            assert list(x) == list(expected["mean_experts"])
            assert list(y) == list(expected["difference"])


def test_compensated_rules_are_hollow_twins():
    _, figure = draw()
    drawn = lines(figure.axes[0])
    for label in ("top k by probability", "one threshold by consequence"):
        plain, hollow = drawn[label], drawn[f"{label}, compensated"]
        assert plain.get_marker() == hollow.get_marker()
        assert plain.get_color() == hollow.get_color() == plain.get_markerfacecolor()
        assert hollow.get_markerfacecolor() == "white"
    looks = {(line.get_marker(), line.get_markerfacecolor()) for line in drawn.values()}
    assert len(looks) == len(drawn)


def test_margin_and_every_rule_are_in_the_legend_once():
    table, figure = draw()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    rules = {kind.words for kind in table["kind"] if kind.rule != "certified"}
    assert set(labels) == {*rules, CERTIFIED, "margin"}
    assert len(labels) == len(set(labels))
    margins = [line for line in figure.axes[1].get_lines() if line.get_label() == "margin"]
    assert list(margins[0].get_ydata()) == [0.01, 0.01]


def test_last_words_alone_cannot_be_drawn_and_one_set_can():
    table = with_kinds(levers(datasets=("lambada",)), "softmax")
    assert figure_of.drawn(table).empty
    _, figure = draw(datasets=("hellaswag",), scaled_at=(), certified=False)
    assert len(figure.axes) == 2
