from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "selection.py"


@pytest.fixture(scope="module")
def benchmark():
    specification = importlib.util.spec_from_file_location("selection_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_benchmark_prints_a_row_for_every_strategy(benchmark, capsys):
    benchmark.main(["--tokens", "64", "--layers", "2", "--rounds", "1", "--cap", "4"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| strategy | compares | stock top-8, ms | ours, ms | ratio |")
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in rows}
    assert list(cells)[:2] == ["regular_k4", "bh_k4_a005"]
    assert all(float(row[3]) > 0 for row in cells.values())
    assert cells["bh_k4_a005"][0] == "statistic"
    assert cells["bh_k4_a005_pooled"][0] == "logit"
    assert cells["bh_k4_a005_per-expert"][0] == cells["storey_k4_a005_pooled"][0] == "p-value"


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
