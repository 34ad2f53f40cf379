from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """The script, imported as running it would: with its folder first on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("selection")
    sys.modules.pop("selection")


@pytest.fixture(scope="module")
def record(benchmark, tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "selection.json"
    benchmark.main(
        ["--tokens", "128", "--layers", "2", "--rounds", "1", "--cap", "4", "--cap", "64",
         "--allocator", "default", "--json", str(path)]
    )  # fmt: skip
    return json.loads(path.read_text())


def test_a_row_for_every_strategy_says_what_was_compared(record):
    rows = {row["strategy"]: row for row in record["selection"]}
    words = ["", "_norm", "_consequence", "_compensated", "_norm_compensated"]
    assert list(rows)[:6] == [*(f"regular_k4{word}" for word in words), "bh_k4_a005"]
    assert all(row["ratio"] > 0 and row["like ratio"] > 0 for row in rows.values())
    compared = {name: row["compares"] for name, row in rows.items()}
    assert compared["bh_k4_a005"] == compared["bh_k64_a005"] == "statistic"
    assert compared["bh_k4_a005_pooled"] == compared["bh_k64_a005_pooled"] == "logit"
    assert compared["bh_k4_a005_per-expert"] == compared["storey_k4_a005_pooled"] == "p-value"
    assert "bh_k64_a005_per-expert" not in rows


def test_rows_name_their_operating_point(record):
    rows = {row["strategy"]: row for row in record["selection"]}
    assert [rows[name]["cap"] for name in ("bh_k4_a005", "bh_k64_a005")] == [4, 64]
    assert rows["bh_k4_a005"]["alpha"] == rows["shuffle.bh_k4_a005"]["alpha"] == 0.05
    assert rows["regular_k4"]["alpha"] is None
    assert (rows["regular_k64"]["mean experts"], rows["regular_k64"]["like k"]) == (64, 64)
    for row in rows.values():
        assert 1 <= row["mean experts"] <= row["cap"]
        assert row["like k"] == round(row["mean experts"])
    wide = rows["bh_k64_a005_unselected"]
    assert wide["mean experts"] > rows["bh_k4_a005_unselected"]["mean experts"]


def test_the_machine_and_versions_are_recorded(record):
    assert record["machine"]["versions"]["torch"]
    assert record["machine"]["threads"] == record["arguments"]["threads"] == 1


def test_the_caps_of_its_own_are_those_of_the_study(benchmark):
    ids = benchmark.default_ids(benchmark.CAPS, "010")
    assert {"bh_k8_a010_pooled", "bh_k16_a010_pooled", "bh_k64_a010_pooled"} <= set(ids)
    assert len(set(ids)) == len(ids)


def test_runs_alternate_swap_order_and_visit_every_layer(benchmark):
    runs = []
    benchmark.compare(
        lambda layer: runs.append(("stock", layer)), lambda layer: runs.append(("ours", layer)),
        layers=3, rounds=2, synchronise=lambda: None,
    )  # fmt: skip
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    assert len(pairs) == 7  # one to warm up
    assert [first[1] for first, _ in pairs[1:]] == [0, 1, 2, 0, 1, 2]
    assert all(first[1] == second[1] for first, second in pairs)
    assert [first[0] for first, _ in pairs[1:]] == ["ours", "stock"] * 3
