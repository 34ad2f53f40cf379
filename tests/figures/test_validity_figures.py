"""The validity page's figures show layers one by one, and all three outcomes of a verdict."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import StepPatch

from moe_routing.analysis.null_size import call_designs, call_nulls
from moe_routing.analysis.outputs import ALL_LAYERS
from moe_routing.figures import validity


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def size_of(null, by_layer):
    rows = [
        {"null": null, "layer": layer, "size": size, "n_tokens": 2000}
        for layer, size in enumerate(by_layer)
    ]
    rows.append({**rows[0], "layer": ALL_LAYERS, "size": np.mean(by_layer), "n_tokens": 4000})
    return pd.DataFrame(rows).assign(design="normal", alpha=0.05, low=0.0, high=1.0)


SIZES = pd.concat(
    [size_of("pooled", [0.05, 0.05]), size_of("per_expert", [0.05, 0.064]),
     size_of("unselected", [0.9, 0.05])]
)  # fmt: skip


def test_histograms_show_the_range_of_layers():
    proportions = {0: [0.5, 0.5], 1: [0.2, 0.8]}
    rows = [
        {"null": "pooled", "design": "normal", "layer": layer, "low": low, "proportion": proportion}
        for layer, both in proportions.items()
        for low, proportion in zip((0.0, 0.5), both, strict=True)
    ]
    figure = validity.pvalue_histograms(pd.DataFrame(rows), SIZES)
    band, mean = (patch for patch in figure.axes[0].patches if isinstance(patch, StepPatch))
    assert band.get_data().values.tolist() == pytest.approx([1.0, 1.6])
    assert band.get_data().baseline.tolist() == pytest.approx([0.4, 1.0])
    assert mean.get_data().values.tolist() == pytest.approx([0.7, 1.3])
    assert "band: range of layers" in figure._suptitle.get_text()


def test_panels_carry_the_outcome_of_each_null():
    verdict = call_nulls(call_designs(SIZES, level=0.05, largest_size=0.06, confidence=0.95))
    figure = validity.size_by_alpha(SIZES, verdict)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["pooled\nvalid", "per expert\nnot shown", "unselected\nfails in 1 layer"]
