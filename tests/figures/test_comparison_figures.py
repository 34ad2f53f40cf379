"""The figures of the comparison show the numbers of their tables."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from moe_routing.errors import InputError
from moe_routing.figures import comparison, comparison_routing, comparison_statistics
from moe_routing.figures.style import look, save, use_style
from moe_routing.routing.strategies import controls, families

DATASETS = {"wikipedia": "token_perplexity", "hellaswag": "accuracy_norm", "lambada": "accuracy"}
STRATEGIES = {
    "regular_k4": ("regular", 4, 4.0), "regular_k8": ("regular", 8, 8.0),
    "adaptive_k8": ("adaptive", 8, 6.0), "bh_k8_a005": ("bh", 8, 2.0),
    "bh_k16_a005": ("bh", 16, 3.0),
}  # fmt: skip
FAMILIES = {name: values[0] for name, values in STRATEGIES.items()}


@pytest.fixture(autouse=True)
def _closed():
    use_style()
    yield
    plt.close("all")


@pytest.fixture
def cells():
    rows = []
    for dataset, metric in DATASETS.items():
        for place, (name, (family, k, experts)) in enumerate(STRATEGIES.items()):
            value = (20.0 if "perplexity" in metric else 0.4) * (1 + place / 10)
            rows.append(
                {
                    "strategy": name, "family": family, "k": k, "dataset": dataset,
                    "alpha": "0.05" if family == "bh" else "none", "null": "within_token",
                    "weighting": "softmax", "metric": metric, "value": value,
                    "ci_low": value * 0.9, "ci_high": value * 1.2, "mean_experts": experts,
                    "tokens_per_second": 1000 / experts, "n_items": 1500,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def points(axis):
    """Every plotted x, y of an axis, bars and rings included."""
    return {
        (round(float(x), 6), round(float(y), 6))
        for line in axis.get_lines()
        for x, y in zip(
            np.atleast_1d(line.get_xdata()), np.atleast_1d(line.get_ydata()), strict=True
        )
    }


def test_pareto_shows_every_cell_with_its_interval(cells):
    figure = comparison.pareto(cells, "regular_k8")
    assert len(figure.axes) == 4  # the last holds the legend
    for axis, dataset in zip(figure.axes[:3], DATASETS, strict=True):
        shown = points(axis)
        scale = 1 if dataset == "wikipedia" else 100  # accuracies in percent
        for row in cells[cells["dataset"] == dataset].itertuples():
            for y in (row.value, row.ci_low, row.ci_high):
                assert (round(row.mean_experts, 6), round(scale * y, 6)) in shown


def test_axes_say_unit_items_and_which_way_is_better(cells):
    axes = comparison.pareto(cells, "regular_k8").axes
    assert axes[0].get_title() == "Wikipedia (n = 1,500)"
    assert axes[0].get_ylabel() == "Token perplexity \N{DOWNWARDS ARROW}"
    assert axes[1].get_ylabel() == "Length-normalised\naccuracy, % \N{UPWARDS ARROW}"


def test_static_curve_is_drawn_whole_and_does_not_squeeze_the_strategies(cells):
    stock = cells[cells["strategy"] == "regular_k8"]
    far = [
        stock.assign(strategy=f"regular_k{k}", k=k, mean_experts=float(k), value=stock["value"] * f)
        for k, f in ((1, 0.2), (32, 1.05), (64, 40.0))
    ]
    curve = pd.concat([cells[cells["family"] == "regular"], *far])
    axis = comparison.pareto(cells, "regular_k8", curve).axes[0]
    line = next(
        container.lines[0]
        for container in axis.containers
        if container.get_label() == "Top-k, softmax"
    )
    assert list(line.get_xdata()) == [1, 4, 8, 32, 64]
    assert axis.get_ylim()[1] < 50  # 64 experts: far outside
    assert 32 < axis.get_xlim()[1] < 64


def test_static_controls_and_rivals_are_drawn_and_count_for_the_front(cells):
    stock = cells[cells["strategy"] == "regular_k8"]
    best = stock.assign(strategy="regular_k1", k=1, mean_experts=1.5, value=19.0)
    curve = pd.concat([cells[cells["family"] == "regular"], best])
    rival = stock.assign(strategy="topp_k8_p050", family="topp", mean_experts=1.0, value=19.5)
    axes = {
        name: comparison.pareto(cells, "regular_k8", *given).axes[0]
        for name, given in {"none": (), "curve": (curve,), "both": (curve, rival)}.items()
    }
    fronts = {
        name: list(next(x for x in axis.get_lines() if x.get_label() == "Pareto front").get_xdata())
        for name, axis in axes.items()
    }
    assert fronts == {"none": [2.0, 4.0], "curve": [1.5], "both": [1.0, 1.5]}
    assert (1.0, 19.5) in points(axes["both"])
    legends = [axis.get_legend() for axis in axes["both"].figure.axes if axis.get_legend()]
    assert "Top-p" in [text.get_text() for text in legends[0].get_texts()]


def test_ring_is_on_the_baseline(cells):
    axis = comparison.pareto(cells, "regular_k8").axes[1]
    (ring,) = [line for line in axis.get_lines() if line.get_label() == "Baseline"]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (8.0, pytest.approx(40 * 1.1))


def test_front_follows_the_orientation_of_the_metric(cells):
    low, high = comparison.pareto(cells, "regular_k8").axes[:2]
    front = {
        axis: next(line for line in axis.get_lines() if line.get_label() == "Pareto front")
        for axis in (low, high)
    }
    # Perplexity: the cheapest is not the best; accuracy rises with the order of the strategies.
    assert list(front[low].get_xdata()) == [2.0, 4.0]
    assert list(front[high].get_xdata()) == [2.0, 3.0]


def test_sweeps_need_two_caps_at_equal_alpha(cells):
    assert set(comparison.max_k_sweeps(cells)["strategy"]) == {"bh_k8_a005", "bh_k16_a005"}
    assert comparison.max_k_sweeps(cells[cells["strategy"] != "bh_k16_a005"]).empty
    assert comparison.max_k_sweeps(cells[cells["family"] != "bh"]).empty


def test_quality_by_max_k_writes_the_experts_used(cells):
    axis = comparison.quality_by_max_k(cells).axes[0]
    assert {text.get_text() for text in axis.texts} == {"2.0", "3.0"}
    assert (
        "BH, alpha 0.05, null within_token, weights softmax"
        in (axis.get_legend_handles_labels()[1])
    )


def test_one_data_set_is_enough(cells):
    one = cells[cells["dataset"] == "lambada"]
    assert len(comparison.pareto(one, "regular_k8").axes) == 1


@pytest.mark.parametrize("sets", [1, 2, 3])
def test_every_family_is_in_the_legend(cells, sets):
    chosen = cells[cells["dataset"].isin(list(DATASETS)[:sets])]
    figure = comparison.pareto(chosen, "regular_k8")
    (legend,) = figure.legends or [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == [
        "Top-k, softmax", "Adaptive", "Benjamini-Hochberg", "Baseline", "Pareto front",
    ]  # fmt: skip


@pytest.fixture
def counts():
    rows = [
        (name, FAMILIES[name], "lambada", layer, experts, proportion)
        for name in ("adaptive_k8", "bh_k8_a005")
        for layer in range(3)
        for experts, proportion in ((1, 0.25), (4 + layer, 0.75))
    ]
    rows += [("regular_k8", "regular", "lambada", layer, 8, 1.0) for layer in range(3)]
    columns = ["strategy", "family", "dataset", "layer", "experts", "proportion"]
    return pd.DataFrame(rows, columns=columns)


def test_experts_by_layer_are_means(counts):
    names = ["adaptive_k8", "bh_k8_a005"]
    figure = comparison_routing.experts_by_layer(counts, names, "regular_k8")
    assert len(figure.axes) == 2  # a row per family
    line = figure.axes[1].get_lines()[0]
    assert line.get_label() == "bh_k8_a005"
    assert np.allclose(line.get_ydata(), [0.25 + 0.75 * (4 + layer) for layer in range(3)])
    assert np.allclose(figure.axes[1].get_lines()[1].get_ydata(), 8)


def test_experts_per_token_is_a_distribution(counts):
    axis = comparison_routing.experts_per_token(counts, ["bh_k8_a005"]).axes[0]
    x, y = (np.asarray(values) for values in axis.get_lines()[0].get_data())
    assert y[0] == 0
    assert y[-1] == pytest.approx(1)
    assert (np.diff(y) >= -1e-12).all()
    assert y[x == 1][-1] == pytest.approx(0.25)
    assert y[x == 5][-1] == pytest.approx(0.75)


@pytest.fixture
def paired():
    rows = []
    for dataset, metric, higher in (
        ("wikipedia", "nats_per_token", False), ("hellaswag", "accuracy_norm", True),
    ):  # fmt: skip
        for name, difference, verdict in (
            ("regular_k4", -0.03, "worse"), ("bh_k8_a005", 0.0, "inconclusive"),
        ):  # fmt: skip
            rows.append(
                {
                    "strategy": name, "dataset": dataset, "metric": metric, "main": True,
                    "higher_is_better": higher, "difference": difference,
                    "low": difference - 0.01, "high": difference + 0.01, "verdict": verdict,
                    "n_items": 1500,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def margins(value=0.01):
    names = ("wikipedia", "hellaswag")
    return pd.DataFrame([{"dataset": name, "margin": value} for name in names])


def test_forest_shades_the_side_of_losses(paired):
    figure = comparison_statistics.forest(paired, margins(), FAMILIES, "regular_k8")
    nats, accuracy = figure.axes
    assert nats.patches[0].get_x() == pytest.approx(0.01)  # more nats are a loss
    edge = accuracy.patches[0].get_x() + accuracy.patches[0].get_width()
    assert edge == pytest.approx(-1.0)  # percentage points


def test_forest_has_losses_on_the_right_in_every_panel(paired):
    figure = comparison_statistics.forest(paired, margins(), FAMILIES, "regular_k8")
    nats, accuracy = figure.axes
    assert not nats.xaxis_inverted()
    assert accuracy.xaxis_inverted()


@pytest.mark.parametrize("largest", [0.3, 2.0, 40.0])
def test_labels_of_a_forest_do_not_touch(paired, largest):
    wide = paired.assign(high=largest, low=-largest / 3)
    figure = comparison_statistics.forest(wide, margins(), FAMILIES, "regular_k8")
    figure.draw_without_rendering()
    for axis in figure.axes:
        inside = [
            label.get_window_extent()
            for tick, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
            if axis.viewLim.intervalx.min() <= tick <= axis.viewLim.intervalx.max()
        ]
        boxes = sorted(inside, key=lambda box: box.x0)
        assert len(boxes) >= 2
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_axes_that_share_a_row_cover_the_largest_of_all_panels(counts):
    more = counts.assign(dataset="hellaswag", experts=3 * counts["experts"])
    both = pd.concat([counts, more])
    figure = comparison_routing.experts_by_layer(both, ["bh_k8_a005"], "regular_k8")
    highest = max(float(line.get_ydata().max()) for axis in figure.axes for line in axis.lines)
    assert all(axis.get_ylim()[1] > highest for axis in figure.axes)
    assert all(axis.get_ylim()[0] == 0 for axis in figure.axes)


def test_forest_fills_only_what_was_shown(paired):
    axis = comparison_statistics.forest(paired, margins(), FAMILIES, "regular_k8").axes[1]
    markers = {
        round(float(line.get_xdata()[0]), 3): line.get_markerfacecolor()
        for line in axis.get_lines()
        if line.get_marker() in (look("regular").marker, look("bh").marker)
    }
    assert markers == {-3.0: look("regular").colour, 0.0: "white"}


def test_forest_without_margins(paired):
    figure = comparison_statistics.forest(paired, pd.DataFrame(), FAMILIES, "regular_k8")
    assert not figure.axes[0].patches


def lightness(colour):
    """Lightness L* of CIE 1976, 0 to 100."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return 116 * np.cbrt(luminance) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_looks_differ_in_marker_and_lightness():
    assert lightness("#FFFFFF") == pytest.approx(100, abs=0.01)
    assert lightness("#777777") == pytest.approx(50, abs=0.3)
    looks = [cls.family.look for cls in (families() | controls()).values()]
    assert len({one.marker for one in looks}) == len(looks) >= 18
    steps = np.diff(sorted(lightness(one.colour) for one in looks))
    assert steps.min() > 1.5  # markers tell them apart; this many colours cannot


def test_every_family_is_drawn_with_its_own_marker_in_every_figure(cells, paired):
    """Also with the markers that are no letter, which a format string could not hold."""
    entries = {name: cls.family for name, cls in (families() | controls()).items()}
    names = list(entries)
    first = cells[(cells["strategy"] == "regular_k8") & (cells["dataset"] == "hellaswag")]
    weights = {name: entry.static_weighting or "softmax" for name, entry in entries.items()}
    own = pd.concat(
        [first.assign(strategy=name, family=name, weighting=weights[name]) for name in names]
    )
    test = paired[paired["dataset"] == "hellaswag"].iloc[[0]]
    tests = pd.concat([test.assign(strategy=name) for name in names])
    of = dict(zip(names, names, strict=True))
    for figure in (
        comparison.pareto(own, "regular"),
        comparison_statistics.forest(tests, margins(), of, "regular"),
    ):
        drawn = {(line.get_marker(), line.get_color()) for line in figure.axes[0].get_lines()}
        assert {(look(name).marker, look(name).colour) for name in names} <= drawn


def test_a_family_that_is_not_installed_is_an_error_and_no_grey_mark():
    with pytest.raises(InputError, match=r"family 'everyother' is not known here; known: regular"):
        look("everyother")


def test_saved_figures_are_equal_files(tmp_path, cells):
    for name in ("one", "two"):
        save(comparison.pareto(cells, "regular_k8"), tmp_path / name)
    for suffix in ("png", "svg"):
        first, second = (tmp_path / f"{name}.{suffix}" for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
        assert first.stat().st_size > 1000
    assert plt.get_fignums() == []
