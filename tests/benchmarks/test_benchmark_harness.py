"""The benchmark against the harness's own model, on three items of each set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_routing.data.items import write_items
from moe_routing.data.tasks import load_items
from moe_routing.errors import InputError

DATA_FILES = Path(__file__).parents[1] / "data_files"


def test_both_give_the_same_answers(script, tmp_path):
    for name in ("hellaswag", "lambada"):
        items = load_items(name, DATA_FILES / f"{name}.jsonl")
        write_items(items, tmp_path / "data" / f"{name}.parquet")
    path = tmp_path / "harness.json"
    options = ["--results", str(tmp_path), "--items", "3", "--batch-sizes", "2,5"]
    options += ["--rounds", "1", "--threads", "1", "--allocator", "default", "--json", str(path)]
    script("harness").main(options)
    rows = json.loads(path.read_text())["items"]
    assert [row["set"] for row in rows] == ["hellaswag"] * 2 + ["lambada"] * 2
    assert [row["implementation"] for row in rows[1::2]] == ["engine", "engine"]
    assert all(
        row["implementation"] in ("HFLM, batches of 2", "HFLM, batches of 5") for row in rows[::2]
    )
    assert all(row["items"] == 3 and row["items/s"] > 0 for row in rows)
    assert max(row["largest difference, nats"] for row in rows) < 1e-3
    assert rows[1]["largest difference, nats"] > 0  # two computations, not one
    assert rows[0]["acc_norm"] == rows[1]["acc_norm"] is not None
    assert rows[2]["acc_norm"] is None


def test_other_accuracies_are_an_error(script):
    row = {"set": "lambada", "acc": 0.25, "acc_norm": None}
    script("harness").check([row, row])
    with pytest.raises(InputError, match=r"lambada: acc is 0.5 by the engine.*0.25"):
        script("harness").check([row, row | {"acc": 0.5}])


def test_without_a_study_it_says_what_is_missing(script, tmp_path):
    with pytest.raises(InputError, match=r"hellaswag.parquet: no such file"):
        script("harness").main(["--results", str(tmp_path)])
