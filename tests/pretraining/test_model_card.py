from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_pretraining.card import write_card
from moe_pretraining.measure import (
    FixedCount,
    measure_model,
    random_experts,
    validation_windows,
    window_losses,
)
from moe_pretraining.model import export_model
from moe_pretraining.plot import plot_training
from moe_pretraining.settings import BatchStage, PretrainConfig
from moe_pretraining.train import Trainer
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError
from moe_routing.routing.strategies.topk import Regular


@pytest.fixture(scope="module")
def run(config: PretrainConfig, tokenizer, tokens: Path, tmp_path_factory) -> Path:
    """A trained and exported run."""
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(config, tokenizer, tokens, folder)
    trainer.run()
    trainer.save_weights(folder / "weights.safetensors")
    export_model(config, folder / "weights.safetensors", tokenizer, folder / "model")
    return folder


@pytest.fixture(scope="module")
def measured(config: PretrainConfig, tokens: Path, run: Path) -> dict:
    return json.loads(json.dumps(measure_model(config, run / "model", tokens)))


def corpus(config: PretrainConfig, tokens: Path) -> dict:
    return {s.name: json.loads((tokens / f"{s.name}.json").read_text()) for s in config.sources}


def test_exported_folder_loads_as_it_is_and_gives_the_trained_models_logits(
    config: PretrainConfig, tokenizer, tokens: Path, run: Path, tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    trained = Trainer(config, tokenizer, tokens, run).model.eval()
    trained.set_experts_implementation(model.get_experts_implementation())
    ids = torch.arange(32)[None]
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(parameter.bfloat16())
        assert torch.equal(model(ids).logits, trained(ids).logits)
    assert AutoTokenizer.from_pretrained(run / "model").encode("tea") == tokenizer.encode("tea")
    with safe_open(run / "model" / "model.safetensors", "pt") as weights:
        experts = [name for name in weights.keys() if ".experts." in name]  # noqa: SIM118
        assert len(experts) == 2 * config.model.num_hidden_layers  # fused, not one an expert
        assert {weights.get_tensor(name).dtype for name in experts} == {torch.bfloat16}
    assert sorted(path.name for path in (run / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_too_large_or_foreign_weights_leave_nothing_behind(
    config: PretrainConfig, tokenizer, run: Path, tmp_path: Path
):
    small = config.model_copy(update={"max_weights_bytes": 1000})
    with pytest.raises(InputError, match=r"max_weights_bytes is 1000, but .* take \d+"):
        export_model(small, run / "weights.safetensors", tokenizer, tmp_path)
    wide = config.model.model_copy(update={"hidden_size": 32})
    other = config.model_copy(update={"model": wide})
    with pytest.raises(InputError, match=r"weights\.safetensors: not the weights of this config"):
        export_model(other, run / "weights.safetensors", tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_windows_are_held_out_text_with_its_bytes_and_documents(
    config: PretrainConfig, tokenizer, tokens: Path
):
    windows = validation_windows(config, tokenizer, tokens)
    assert set(windows.source_W) == {"first", "second"}
    for row, source, document, size in zip(
        windows.ids_WL, windows.source_W, windows.document_W, windows.bytes_W, strict=True
    ):
        held_out = np.load(tokens / f"{source}.validation.npy")
        starts = range(0, held_out.size - config.sequence_length, config.sequence_length)
        places = [s for s in starts if np.array_equal(held_out[s : s + row.size], row)]
        assert len(places) == 1
        assert document == f"{source}/{(held_out[: places[0]] == 0).sum()}"
        assert size == len(tokenizer.decode(row[1:][row[1:] != 0]).encode())


def test_measures_equal_a_plain_forward_pass(
    config: PretrainConfig, tokenizer, tokens: Path, run: Path, measured: dict
):
    windows = validation_windows(config, tokenizer, tokens)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    nats, count = {"first": 0.0, "second": 0.0}, {"first": 0, "second": 0}
    size = dict(count)
    with torch.no_grad():
        for row, source, n_bytes in zip(
            windows.ids_WL, windows.source_W, windows.bytes_W, strict=True
        ):
            ids = torch.from_numpy(row)
            logits = model(ids[None, :-1]).logits[0]
            nats[source] += F.cross_entropy(logits, ids[1:], reduction="sum").item()
            count[source] += row.size - 1
            size[source] += int(n_bytes)
    for source, part in measured["validation"]["sources"].items():
        assert part["tokens"] == count[source]
        assert part["nats_per_token"]["estimate"] == pytest.approx(
            nats[source] / count[source], rel=1e-5
        )
        assert part["bits_per_byte"]["estimate"] == pytest.approx(
            nats[source] / math.log(2) / size[source], rel=1e-5
        )
    total = sum(nats.values()) / sum(count.values())
    assert measured["static_k"]["2"] == pytest.approx(total, rel=1e-5)
    assert set(measured["static_k"]) == {"1", "2", "4", "6", "8"}
    assert measured["static_k"]["1"] != measured["static_k"]["2"]
    low, high = (measured["validation"]["all"]["nats_per_token"][key] for key in ("low", "high"))
    assert low < total < high


def test_copying_is_the_loss_of_a_second_reading(
    config: PretrainConfig, tokenizer, tokens: Path, run: Path, measured: dict
):
    windows = validation_windows(config, tokenizer, tokens)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    half = windows.ids_WL.shape[1] // 2
    first, second = [], []
    for row in windows.ids_WL:
        ids = torch.from_numpy(np.tile(row[:half], 2))
        with torch.no_grad():
            losses = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
        first += losses[: half - 1].tolist()
        second += losses[half - 1 :].tolist()
    assert measured["copying"]["tokens"] == half
    assert measured["copying"]["first"] == pytest.approx(np.mean(first), rel=1e-5)
    assert measured["copying"]["second"] == pytest.approx(np.mean(second), rel=1e-5)


def test_routing_is_that_of_the_stock_router(
    config: PretrainConfig, tokenizer, tokens: Path, run: Path, measured: dict
):
    windows = validation_windows(config, tokenizer, tokens)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(torch.from_numpy(windows.ids_WL[:, :-1]), output_router_logits=True)
    for layer, logits_TE in enumerate(output.router_logits):
        probability_TE = logits_TE.softmax(-1)
        top = probability_TE.topk(2)
        load_E = top.indices.flatten().bincount(minlength=8).double()
        routing = {key: rows[layer] for key, rows in measured["routing"].items() if key != "tokens"}
        assert routing["max_mean_load"] == pytest.approx((load_E.max() / load_E.mean()).item())
        assert routing["dead_experts"] == (load_E == 0).sum().item()
        assert routing["selected_mass"] == pytest.approx(top.values.sum(1).mean().item(), rel=1e-5)
        entropy = -(probability_TE * probability_TE.log()).sum(1).mean().item()
        assert routing["entropy"] == pytest.approx(entropy, rel=1e-5)


def test_random_experts_keep_the_scale_of_the_layer(
    config: PretrainConfig, tokenizer, tokens: Path, run: Path, measured: dict
):
    ids_WL = validation_windows(config, tokenizer, tokens).ids_WL
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    losses, mass = {}, {}
    fixed = FixedCount(max_k=2, weighting="mass_matched")
    for strategy in (Regular(k=2), fixed, random_experts(2, config.seed)):
        recorder = WeightSums()
        with routed(model, strategy, recorder=recorder):
            losses[strategy.family.name] = window_losses(model, ids_WL, strategy.id)
        mass[strategy.family.name] = recorder.sums[0]
    # The first layer sees the same input under each of them.
    torch.testing.assert_close(mass["randomid"], mass["regular"])
    np.testing.assert_allclose(losses["fixed"], losses["regular"], rtol=1e-6)
    total = losses["randomid"].sum() / (ids_WL[:, 1:]).size
    assert measured["random_experts"]["loss"] == pytest.approx(total)


class WeightSums(Recorder):
    """Keeps the summed weights of each token, a forward pass and layer after the other."""

    def __init__(self):
        super().__init__()
        self.sums = []

    def add(self, layer, routing, *bounds):
        self.sums.append(routing.weight_TK.sum(1))
        super().add(layer, routing, *bounds)


def test_card_tells_what_was_measured(
    config: PretrainConfig, tokens: Path, run: Path, measured: dict, tmp_path: Path
):
    log = pd.read_csv(run / "training.csv")
    write_card(config, measured, log, corpus(config, tokens), tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{measured['parameters']['total']:,}" in card
    assert f"{measured['random_experts']['difference']['estimate']:.3f} (" in card
    assert f"{log['validation_loss'].iloc[-1]:.3f}" in card
    for part in measured["validation"]["sources"].values():
        assert f"{part['nats_per_token']['estimate']:.3f} (" in card
    best = min(measured["static_k"], key=measured["static_k"].__getitem__)
    assert f"The loss is lowest at {best} experts" in card
    assert f"and {measured['copying']['second']:.3f} the second time" in card
    assert "repeated to the end" not in card
    assert "lm-evaluation-harness" not in card
    assert "{" not in card
    assert "nan" not in card


def test_card_says_that_windows_were_repeats(
    config: PretrainConfig, tokens: Path, run: Path, measured: dict, tmp_path: Path
):
    log = pd.read_csv(run / "training.csv")
    repeated = config.model_copy(update={"repeat_share": 0.2, "repeat_steps": 3})
    write_card(repeated, measured, log, corpus(config, tokens), tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "20 % of the windows of the run's first 3 steps are a short text" in card


def test_card_says_that_words_that_recur_weigh_more(
    config: PretrainConfig, tokens: Path, run: Path, measured: dict, tmp_path: Path
):
    log = pd.read_csv(run / "training.csv")
    for weight, said in ((1.0, False), (6.0, True)):
        weighted = config.model_copy(update={"recurrence_weight": weight})
        write_card(weighted, measured, log, corpus(config, tokens), tmp_path / "README.md")
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert ("has occurred in its window before has weight\n6, unless" in card) == said
    late = config.model_copy(update={"recurrence_weight": 6.0, "recurrence_start": 18})
    write_card(late, measured, log, corpus(config, tokens), tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "has weight\n6 after the first 18 steps, unless" in card


def test_card_names_the_optimizer_and_the_stages_of_the_batch(
    config: PretrainConfig, tokens: Path, run: Path, measured: dict, tmp_path: Path
):
    log = pd.read_csv(run / "training.csv")
    stages = [BatchStage(steps=8, batch_size=1), BatchStage(steps=4, batch_size=2)]
    path = tmp_path / "README.md"
    write_card(config, measured, log, corpus(config, tokens), path)
    plain = path.read_text(encoding="utf-8")
    grown = config.model_copy(update={"optimizer": "muon", "batch_warmup": stages})
    write_card(grown, measured, log, corpus(config, tokens), path)
    card = path.read_text(encoding="utf-8")
    assert "Muon" not in plain
    assert "\nAdamW (betas 0.9 and 0.95, weight decay 0.1 on matrices), gradient norm" in plain
    assert "| 4 sequences of 16 tokens" in plain
    assert "\nMuon (momentum 0.95, five Newton-Schulz steps, weight decay 0.1," in card
    assert "1 for 8 steps, 2 for 4 steps, then 4 sequences of 16 tokens" in card
    (row,) = [line for line in card.splitlines() if line.startswith("| first") and "%" in line]
    epochs = float(row.split("|")[6])
    counted = corpus(config, tokens)["first"]["tokens"]
    assert epochs == pytest.approx(0.75 * (8 + 8 + 12 * 4) * 16 / counted, abs=0.006)


@pytest.mark.parametrize(("at_64", "words"), [(3.01, "does not show"), (4.5, "shows that too")])
def test_card_compares_the_price_of_all_experts_with_the_large_models(
    config: PretrainConfig, tokens: Path, run: Path, measured: dict, tmp_path: Path, at_64, words
):
    log = pd.read_csv(run / "training.csv")
    path = tmp_path / "README.md"
    write_card(config, measured, log, corpus(config, tokens), path)
    assert "OLMoE-1B-7B loses" not in path.read_text(encoding="utf-8")
    swept = {**measured, "static_k": {"8": 3.0, "64": at_64}}
    write_card(config, swept, log, corpus(config, tokens), path)
    card = path.read_text(encoding="utf-8")
    assert "OLMoE-1B-7B loses 1.14 nats per token" in card
    assert f"this model {at_64 - 3:.3f}: it {words}" in card


def test_card_takes_benchmarks_of_these_weights_only(
    config: PretrainConfig, tokens: Path, run: Path, measured: dict, tmp_path: Path
):
    metric = {"metric": "bits_per_byte", "value": 1.234, "low": 1.2, "high": 1.3, "n": 62}
    cell = {
        "strategy": {"id": "regular_k2"},
        "dataset": "wikitext",
        "n_items": 62,
        "metrics": [metric],
        "provenance": {"weights_sha256": measured["weights_sha256"]},
    }
    log = pd.read_csv(run / "training.csv")
    write_card(config, measured, log, corpus(config, tokens), tmp_path / "README.md", [cell])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "bits per byte" in card
    assert "1.234 (1.200 to 1.300)" in card
    assert f"windows of at most {config.sequence_length} tokens" in card
    foreign = {**cell, "provenance": {"weights_sha256": "0" * 64}}
    with pytest.raises(
        InputError, match="cell 'regular_k2/wikitext' was scored with other weights"
    ):
        write_card(config, measured, log, corpus(config, tokens), tmp_path / "no.md", [foreign])


def test_figure_shows_both_losses_and_is_the_same_file_twice(run: Path, tmp_path: Path):
    log = pd.read_csv(run / "training.csv")
    for name in ("once.png", "twice.png"):
        plot_training(log, tmp_path / name)
    once, twice = ((tmp_path / name).read_bytes() for name in ("once.png", "twice.png"))
    assert once.startswith(b"\x89PNG")
    assert once == twice
