"""Tables of the report."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from moe_routing import wording
from moe_routing.reporting.tables import definition, null_table


def test_the_table_of_nulls_says_h0_with_the_epsilon_in_use(tmp_path):
    folder = tmp_path / "calibration" / "nulls"
    folder.mkdir(parents=True)
    row = {"upper_to_lower": [1.0, 1.5], "smallest_p": 1e-4}
    pd.DataFrame(row).to_csv(folder / "pooled.csv")
    for name, epsilon in (("needed", 3e-5), ("needed_e1e4_loss", 1e-4)):
        toggled = {"epsilon": epsilon, "needed_proportion": [0.125, 0.25]}
        pd.DataFrame({**row, **toggled}).to_csv(folder / f"{name}.csv")
    study = SimpleNamespace(folder=tmp_path, table=lambda name: pd.read_csv(tmp_path / name))
    rows = null_table(study).set_index("Null")
    assert rows["Needed"].to_list() == ["0.125 to 0.25", "0.125 to 0.25", "not given"]
    table = rows["H0 in words"]
    epsilon = wording.scientific(3e-5)
    assert table["`needed`"].endswith(f"by less than epsilon = {epsilon} nats (KL)")
    epsilon = wording.typeset("1e-4")
    assert table["`needed_e1e4_loss`"].endswith(f"by less than epsilon = {epsilon} nats")
    assert "typical" in table["`pooled`"]


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("regular_k3", "top 3, softmax weights"),
        ("regular_k3_norm", "top 3, softmax weights, ranked by norm"),
        (
            "regular_k3_norm_own_compensated_scaled",
            "top 3, softmax weights, ranked by norm, of the model's own choice, the mean output of "
            "dropped experts in their place, output at fitted scale",
        ),
    ],
)
def test_a_definition_says_what_ranks_experts_and_what_stands_in(strategy, said):
    row = {"strategy": strategy, "family": "regular", "k": 3.0, "weighting": "softmax"}
    assert definition(pd.Series({**row, "alpha": "none", "null": "none"})).lower() == said
