"""The figure of sizes has every null and layer, and marks those above the allowed size."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from moe_routing.analysis.null_size import call_designs, call_nulls
from moe_routing.analysis.outputs import ALL_LAYERS
from moe_routing.figures import validity


def size_of(null, by_layer):
    rows = [
        {"null": null, "layer": layer, "size": size, "n_tokens": 2000}
        for layer, size in enumerate(by_layer)
    ]
    rows.append({**rows[0], "layer": ALL_LAYERS, "size": np.mean(by_layer), "n_tokens": 4000})
    return pd.DataFrame(rows).assign(design="normal", alpha=0.05, low=0.0, high=1.0)


def test_sizes_above_the_allowed_one_are_bold():
    sizes = pd.concat([size_of("pooled", [0.05, 0.04]), size_of("per_expert", [0.9, 0.05])])
    verdict = call_nulls(call_designs(sizes, level=0.05, largest_size=0.06, confidence=0.95))
    axis = validity.size_by_layer(sizes, verdict).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["pooled", "per expert"]
    texts = {text.get_position(): (text.get_text(), text.get_weight()) for text in axis.texts}
    assert texts == {
        (0, 0): (".05", "normal"), (1, 0): (".04", "normal"),
        (0, 1): (".90", "bold"), (1, 1): (".05", "normal"),
    }  # fmt: skip
    plt.close("all")
