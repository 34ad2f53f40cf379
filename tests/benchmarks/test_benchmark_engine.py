"""The benchmark of the engine at a tiny size: implementations agree, every table is there."""

from __future__ import annotations

import json

import torch

OPTIONS = ["--tokens", "96", "--window", "32", "--calibration-tokens", "512", "--rounds", "1"]
OPTIONS += ["--stock-rounds", "1", "--threads", "1", "--allocator", "default"]
STRATEGIES = ["--strategies", "regular_k1,regular_k4,bh_k16_a005_unselected"]


def test_all_implementations_score_the_same(script):
    engine = script("engine")
    bench = engine.load(engine.parse([*OPTIONS, "--strategies", "regular_k8"]))
    expected = bench.stock("eager")
    assert expected.shape == (3, 31)
    for strategy in ("", "regular_k8"):
        torch.testing.assert_close(bench.stock("grouped_mm", strategy), expected, rtol=0, atol=1e-4)
        whole = bench.engine(None, strategy)
        torch.testing.assert_close(whole, expected.sum(1), rtol=0, atol=1e-3)
        last = bench.engine(1, strategy)
        torch.testing.assert_close(last, expected[:, -1], rtol=0, atol=1e-4)
    assert (bench.engine(None, "regular_k1") - expected.sum(1)).abs().min() > 0.1
    assert bench.windows("stock batched_mm") == 2  # of the three windows
    torch.testing.assert_close(bench.stock("batched_mm"), expected[:2], rtol=0, atol=1e-4)


def test_the_tables(script, tmp_path):
    path = tmp_path / "engine.json"
    script("engine").main([*OPTIONS, *STRATEGIES, "--json", str(path)])
    record = json.loads(path.read_text())
    stock = ["stock eager", "stock grouped_mm", "stock batched_mm"]
    names = [row["implementation"] for row in record["scoring"]]
    assert names == [*stock, "engine, perplexity", "engine, short"]
    assert record["scoring"][1]["times stock grouped_mm"] == 1
    assert all(row["tokens/s"] > 0 for row in record["scoring"])
    experts = {row["strategy"]: row["mean experts"] for row in record["experts"]}
    assert experts["regular_k8"] == 8
    mean = experts["bh_k16_a005_unselected"]
    assert 1 <= mean <= 16
    assert f"regular_k{-int(-mean // 1)}" in experts  # its static peer is timed too
    assert list(experts.values()) == sorted(experts.values())
    assert record["line"][0]["strategies"] >= 3
    agreement = {row["strategy"]: row for row in record["agreement"]}
    assert set(agreement) == {"stock router", *STRATEGIES[1].split(","), "regular_k8"}
    assert max(row["engine, every position"] for row in agreement.values()) < 1e-3
    assert max(row["engine, last position"] for row in agreement.values()) < 1e-4
    assert {row["strategy"] for row in record["stock"]} == set(agreement) - {"stock router"}
    for name in ("engine", *stock):
        assert all(row[f"{name}, tokens/s"] > 0 for row in record["stock"])
    assert record["machine"]["versions"]["torch"]
