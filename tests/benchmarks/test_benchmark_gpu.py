"""The first check of a GPU, on the CPU at a tiny size."""

from __future__ import annotations

import json

import pytest
import torch


def test_the_whole_script(script, tmp_path):
    path = tmp_path / "gpu.json"
    options = ["--scale", "64", "--tokens", "128", "--window", "64", "--rounds", "1"]
    options += ["--toggled-tokens", "1", "--training-batch", "256", "--threads", "1"]
    options += ["--allocator", "default", "--json", str(path)]
    assert script("gpu").main(options) == 0
    rows = {row["what"]: row for row in json.loads(path.read_text())["check"]}
    checks = [row for row in rows.values() if "at most" in row]
    assert len(checks) == 4
    assert all(row["passed"] for row in checks)
    assert rows["stock grouped_mm: against stock grouped_mm"]["value"] == 1
    assert {row["unit"] for row in rows.values()} >= {"tokens/s", "times", "minutes"}
    rate = next(row["value"] for what, row in rows.items() if what.startswith("training the"))
    assert rows["300 M tokens of it, projected"]["value"] == pytest.approx(3e8 / rate / 60)


def test_a_failed_check_is_said_and_is_the_exit_code(script, monkeypatch, capsys):
    gpu = script("gpu")
    failed = gpu.Row("experts", 2.0, "nats/window", at_most=1.0)
    monkeypatch.setattr(gpu, "correctness", lambda *_: [failed])
    monkeypatch.setattr(gpu, "speed", lambda _: [gpu.Row("speed", 1.0, "tokens/s")])
    monkeypatch.setattr(gpu, "training", lambda _: [])
    assert gpu.main(["--allocator", "default"]) == 1
    assert capsys.readouterr().err == "gpu.py: failed: experts\n"
    assert not gpu.Row("no number", float("nan"), "", at_most=1.0).passed


def test_other_experts_are_counted_by_token(script):
    one = torch.tensor([[True, False], [True, True], [False, True]])
    two = torch.tensor([[True, False], [True, False], [True, False]])
    assert script("gpu").other(one, two) == 2
