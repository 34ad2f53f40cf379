"""The figure of the consequence law shows its tables."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from planted_consequence import correlation_table, law_table, removals

from moe_routing.figures.consequence import consequence_law
from moe_routing.figures.style import save, use_style


@pytest.fixture(scope="module")
def tables():
    planted = removals()
    return planted, law_table(planted), correlation_table(planted)


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def test_lines_have_slope_2_and_the_constant_of_their_layer(tables):
    figure = consequence_law(*tables)
    law = tables[1].query("dropped == 'omitted'").set_index("layer")
    for axis, layer in zip(figure.axes[:3], (0, 3, 5), strict=True):
        points, line = axis.get_lines()
        x, y = (np.asarray(values) for values in line.get_data())
        assert np.allclose(y, law.loc[layer, "constant"] * x**2)
        own = tables[0].query("dropped == 'omitted' and layer == @layer")
        assert set(points.get_ydata()) == set(own["kl"])
        assert axis.get_title().startswith(f"Layer {layer}\n")


def test_correlations_are_those_of_the_table(tables):
    figure = consequence_law(*tables)
    table = tables[2].query("dropped == 'omitted' and layer != 'all'")
    table = table.set_index(["effect", "predictor"])["spearman"]
    for axis, effect in zip(figure.axes[3:], ("kl", "loss"), strict=True):
        lines = axis.get_lines()
        for number, predictor in enumerate(("weight", "weight_norm", "predicted")):
            assert list(lines[number].get_ydata()) == list(table.loc[(effect, predictor)])


def test_one_layer_is_enough(tables, tmp_path):
    planted, law, correlations = (table[table["layer"].isin([0, "0"])] for table in tables)
    save(consequence_law(planted, law, correlations), tmp_path / "one")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_many_removals_are_thinned(tables):
    figure = consequence_law(removals(layers=1, tokens=1000), *tables[1:])
    assert len(figure.axes[0].get_lines()[0].get_xdata()) <= 2500
