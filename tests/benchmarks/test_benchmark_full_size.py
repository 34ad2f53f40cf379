"""The benchmark of OLMoE-1B-7B's architecture, much narrower."""

from __future__ import annotations

import json

import pytest
import torch


def test_the_whole_script(script, tmp_path):
    path = tmp_path / "full_size.json"
    options = ["--scale", "64", "--tokens", "128", "--window", "64", "--rounds", "1"]
    options += ["--threads", "1", "--allocator", "default", "--json", str(path)]
    script("full_size").main(options)
    record = json.loads(path.read_text())
    names = [row["implementation"] for row in record["scoring"]]
    assert names == ["stock eager", "stock grouped_mm", "engine, perplexity", "engine, short"]
    assert [row["experts"] for row in record["rates"]] == [2, 4, 6, 8, 16, 32, 64]
    total = record["projection"][-1]
    assert total["strategies"] == 23
    assert "69 cells" in total["arithmetic"]
    assert 0.7 < record["router"][0]["standard deviation"] < 1.2
    assert 3.7 < record["router"][0]["kurtosis"] < 6.0
    assert record["router"][0]["largest load / mean load"] > 1.5


def test_it_is_olmoe_and_all_implementations_score_the_same(script):
    full_size = script("full_size")
    model = full_size.random_model(64, torch.float32, "cpu")
    assert model.config.num_hidden_layers == 16
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (64, 8)
    ids = torch.randint(1, model.config.vocab_size, (2, 16))
    bench = full_size.Bench(model, full_size.NoTokenizer(), ids)
    torch.testing.assert_close(bench.engine(None), bench.stock("eager").sum(1), rtol=1e-5, atol=0)


def test_the_projection_adds_up(script):
    full_size = script("full_size")
    tokens = sum(full_size.STUDY_TOKENS.values())
    rates = {8: tokens / 60, 64: tokens / 600}  # one and ten minutes per strategy
    rows = full_size.projection(["regular_k2", "bh_k8_a005", "bh_k16_a005"], rates)
    assert [row["minutes"] for row in rows] == pytest.approx([2, 10, 12])
    assert [row["strategies"] for row in rows] == [2, 1, 3]
    assert rows[0]["arithmetic"] == f"2 x {tokens:,} tokens / {tokens / 60:,.0f} tokens/s / 60"


def test_what_is_not_given_follows_the_device(script):
    parse = script("full_size").parse
    here, there = parse([]), parse(["--device", "cuda"])
    assert (here.scale, here.tokens, here.dtype) == (8, 4096, "float32")
    assert (there.scale, there.tokens, there.dtype) == (1, 65536, "bfloat16")
