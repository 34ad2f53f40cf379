"""The figures of the ablation show their tables."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import planted_ablation as planted
import pytest

from moe_routing.figures import ablation
from moe_routing.figures.style import use_style


@pytest.fixture(scope="module")
def tables():
    return planted.all_tables()


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def containers(axis):
    """Return the drawn points of an axis by label."""
    return {bars.get_label(): bars.lines[0].get_data() for bars in axis.containers}


def test_rates_against_alpha_and_by_layer(tables):
    table = tables["ablation"]
    figure = ablation.false_discoveries(table, 0.05)
    above, below = figure.axes[:3], figure.axes[3:6]
    told = table[table["primary"] & (table["null"] == "needed")]
    for axis, lower, (name, (effect, part, _)) in zip(
        above, below, ablation.TOLD.items(), strict=True
    ):
        rows = told[(told["effect"] == effect) & (told["part"] == part)]
        _, drawn = containers(axis)["needed"]
        assert list(drawn) == list(rows.loc[rows["layer"] == "all", name])
        layers = rows[(rows["layer"] != "all") & np.isclose(rows["alpha"], 0.05)]
        assert any(list(line.get_ydata()) == list(layers[name]) for line in lower.get_lines())
    assert "loss not raised by 0.01 nats" in above[1].get_title()
    assert below[0].get_title() == "By layer, alpha 0.05"
    # A null without discoveries has a rate, and no proportions.
    assert "pooled" in containers(above[0])
    assert "pooled" not in containers(above[1])


def test_needed_experts_by_layer_and_class(tables):
    table = tables["needed_experts"]
    left, right = ablation.needed_experts(table).axes
    every = table[(table["class"] == "all tokens") & (table["layer"] != "all")]
    for line, epsilon in zip(left.get_lines(), (planted.EPSILON, 1e-3), strict=True):
        assert list(line.get_ydata()) == list(every.loc[every["epsilon"] == epsilon, "mean"])
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names[0] == "frequency: rare"
    assert names[-2:] == ["inside a word", "word start"]
    assert len(names) == 11


def test_what_is_left_out(tables):
    figure = ablation.left_out(tables["left_out"], tables["joint_removals"], tables["headroom"])
    missed, joint, orders = figure.axes
    rows = tables["left_out"].query("bounded and layer != 'all' and part == 'removed'")
    rows = rows[rows["epsilon"] == planted.EPSILON]
    assert list(missed.get_lines()[0].get_ydata()) == list(rows["left_out"])
    layers = tables["joint_removals"].query("layer != 'all'")
    assert list(joint.get_lines()[0].get_ydata()) == list(layers["kl"])
    assert joint.get_xticklabels()[-1].get_text() == "all"
    for order, label in ablation.ORDERS.items():
        _, drawn = containers(orders)[label]
        own = tables["headroom"]
        assert list(drawn) == list(own.loc[own["order"] == order, "kl"])


def test_files_are_read_and_drawn(tables, tmp_path):
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    ablation.draw_ablation(tmp_path)
    made = {path.name for path in (tmp_path / "ablation_plots").glob("*.png")}
    assert made == {f"{name}.png" for name in ablation.ABLATION.plots}
