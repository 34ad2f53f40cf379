"""With max_k = 64, memory follows the selected pairs, not tokens x 64 x hidden size."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from moe_routing.engine import experts as implementation

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TOKENS, SLOTS, HIDDEN, INNER = 512, 64, 64, 16


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("memory")


@pytest.fixture(params=["_grouped", "_grouped_tiled", "_loop_tiled", "selected"])
def kernel(request, monkeypatch):
    """Each kernel that computes selected pairs only, and the one that is selected by default."""
    if request.param != "selected":
        kernel = getattr(implementation, request.param)
        monkeypatch.setattr(implementation, "select_kernel", lambda *_: kernel)
    return request.param


def test_bytes_alive_are_counted_once_and_until_they_are_freed(memory):
    with memory.PeakBytes() as bytes_:
        first = torch.zeros(1000)
        second = first + 1
        assert bytes_.alive == 8000
        del first
        view = second.view(10, 100).add_(1)
        assert bytes_.alive == 4000
        del second, view
        torch.ones(5)
    assert bytes_.alive == 0
    assert bytes_.peak == 8000


def test_few_selected_pairs_of_64_slots_hold_few_rows(memory, kernel):
    index_TK = memory.make_index(TOKENS, SLOTS, 2)
    pairs = int((index_TK < 64).sum())
    assert index_TK.shape == (TOKENS, SLOTS)
    assert pairs == 2 * TOKENS + SLOTS - 2
    # A copy of a pair's input and of its output, and the sum of each token; 64 slots per token
    # would be 32,768 rows or more.
    assert memory.rows_alive(index_TK, HIDDEN, INNER) <= 2 * pairs + 2 * TOKENS


def test_the_same_pairs_need_no_more_rows_in_64_slots_than_in_8(memory, kernel):
    wide_TK = memory.make_index(TOKENS, SLOTS, 2)
    wide_TK[0, 8:] = 64
    rows = [memory.rows_alive(index_TK, HIDDEN, INNER) for index_TK in (wide_TK, wide_TK[:, :8])]
    assert rows[0] == rows[1]


def test_memory_rises_with_the_pairs(memory, monkeypatch):
    monkeypatch.setattr(implementation, "select_kernel", lambda *_: implementation._grouped)
    peaks = {
        mean: memory.peak_bytes(memory.make_index(TOKENS, SLOTS, mean), HIDDEN, INNER)
        for mean in (2, 16, 64)
    }
    assert peaks[16] > 3 * peaks[2]
    assert peaks[64] > 3 * peaks[16]
    assert peaks[64] > TOKENS * SLOTS * HIDDEN * 4  # so that the count does see the rows


def test_all_pairs_are_not_held_at_once_on_the_cpu(memory):
    index_TK = memory.make_index(TOKENS, SLOTS, 64)
    assert memory.peak_bytes(index_TK, HIDDEN, INNER) < TOKENS * SLOTS * HIDDEN * 4


def test_the_benchmark_has_a_row_for_every_mean(memory, tmp_path, capsys):
    path = tmp_path / "memory.json"
    sizes = ["--tokens", "64", "--slots", "8", "--hidden", "16", "--inner", "8"]
    memory.main([*sizes, "--json", str(path)])
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [row["experts per token"] for row in record["memory"]] == [1, 2, 4, 8]
    assert record["machine"]["versions"]["torch"]
    assert "| 8 | 512 |" in capsys.readouterr().out
