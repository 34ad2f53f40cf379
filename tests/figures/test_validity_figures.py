"""Figures of the validity analysis show what their tables say."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moe_routing.analysis.null_size import call_designs
from moe_routing.analysis.outputs import ALL_LAYERS
from moe_routing.figures import validity


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def size_of(null, design, by_layer):
    rows = [
        {"null": null, "layer": layer, "size": size, "n_tokens": 2000}
        for layer, size in enumerate(by_layer)
    ]
    rows.append({**rows[0], "layer": ALL_LAYERS, "size": np.mean(by_layer), "n_tokens": 4000})
    return pd.DataFrame(rows).assign(design=design, alpha=0.05, low=0.0, high=1.0)


def test_sizes_above_the_allowed_one_are_bold_and_noise_is_to_the_right():
    sizes = pd.concat(
        [
            size_of("pooled", "real", [0.05, 0.01]),
            size_of("pooled", "normal", [0.05, 0.04]),
            size_of("per_expert", "normal", [0.9, 0.05]),
        ]
    )
    rule = {"level": 0.05, "largest_size": 0.06, "confidence": 0.95}
    designs = call_designs(sizes, **rule, if_noise=lambda design: design == "real")
    axis = validity.size_by_design(designs).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["pooled", "per expert"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["normal", "real"]
    texts = {text.get_position(): (text.get_text(), text.get_weight()) for text in axis.texts}
    assert texts == {
        (0, 0): ("5.0", "normal"), (1, 0): ("5.0", "normal"), (0, 1): ("90.0", "bold"),
    }  # fmt: skip
    (line,) = axis.lines
    assert set(line.get_xdata()) == {0.5}


def rates(alphas=(0.01, 0.05), texts=("calibration", "hellaswag")):
    rows = [
        {"text": text, "procedure": procedure, "part": part, "alpha": alpha, "layer": layer,
         "fdr": alpha * (1 + (part == "routed")), "low": 0.5 * alpha, "high": 4 * alpha,
         "n_tokens": 10, "n_documents": 5}
        for text in texts
        for procedure in ("bh", "by")
        for part in ("rule", "routed")
        for alpha in alphas
        for layer in ("0", "1", ALL_LAYERS)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def resampled(alphas=(0.01, 0.05)):
    rows = [
        {"calibration": number, "alpha": alpha, "layer": layer, "fdr": alpha * (1 + number)}
        for number in range(3)
        for alpha in alphas
        for layer in ("0", "1", ALL_LAYERS)
    ]
    return pd.DataFrame(rows)


def test_rates_have_a_panel_per_text_and_level_and_a_band_of_calibrations():
    figure = validity.false_discoveries(rates(), resampled())
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        "Calibration text, alpha 0.01", "Calibration text, alpha 0.05",
        "HellaSwag, alpha 0.01", "HellaSwag, alpha 0.05",
    ]  # fmt: skip
    first = figure.axes[0]
    bars = [end for bar in first.patches for end in (bar.get_y(), bar.get_height())]
    assert bars == pytest.approx([0.01, 0.02] * 2)
    assert not figure.axes[2].patches
    points = [list(container.lines[0].get_ydata()) for container in first.containers[1:]]
    assert points == [[0.01, 0.01], [0.02, 0.02]]
    assert first.get_ylim() == pytest.approx((0, 0.03))


def test_rates_without_the_usual_levels_have_a_panel_of_the_largest():
    figure = validity.false_discoveries(rates((0.2, 0.3)), resampled((0.2, 0.3)))
    assert {axis.get_title() for axis in figure.axes} == {
        "Calibration text, alpha 0.3", "HellaSwag, alpha 0.3",
    }  # fmt: skip


def test_rates_by_level_have_a_line_per_procedure_and_part():
    figure = validity.rates_by_level(rates())
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert sorted(labels) == [
        "BH, floor and cap included", "BH, rule", "BY, floor and cap included", "BY, rule", "alpha",
    ]  # fmt: skip


def test_dead_experts_have_both_designs_and_both_scores():
    layers = pd.DataFrame(
        {"score": score, "procedure": procedure, "alpha": 0.05, "layer": layer,
         "any_proportion": 0.04, "low": 0.02, "high": 0.07}
        for score in ("probability", "norm")
        for procedure in ("bh", "by")
        for layer in ("0", "1", ALL_LAYERS)
    )  # fmt: skip
    experts = rates((0.05,), ("calibration",)).assign(
        dead_slots=0.03, dead_slots_low=0.01, dead_slots_high=0.06, dead=0.125
    )
    figure = validity.dead_experts(layers, experts)
    above, below = figure.axes
    assert above.get_legend_handles_labels()[1] == [
        "alpha", "any selection, probability", "any selection, norm",
    ]  # fmt: skip
    assert [list(part.lines[0].get_ydata()) for part in below.containers] == [
        [0.05, 0.05], [0.03, 0.03],
    ]  # fmt: skip
