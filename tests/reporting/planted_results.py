"""Writes a results folder whose effects are known, cell by cell, without any model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imsave
from planted_items import with_gold

from moe_routing.analysis.baseline import write_baseline
from moe_routing.analysis.bh import write_bh
from moe_routing.config.cells import TIMING_FILE, UNIQUE_FILE
from moe_routing.config.study import StudyConfig
from moe_routing.data.items import write_items
from moe_routing.data.tasks import load_items
from moe_routing.engine.loading import LoadedModel, describe_checkpoint
from moe_routing.engine.recorder import RoutingStatistics
from moe_routing.evaluation.calibrate import sample_router_logits
from moe_routing.evaluation.collect import write_tables
from moe_routing.evaluation.record import specification
from moe_routing.reporting.results import StudyResults
from moe_routing.routing.budget import Budget, budget_path
from moe_routing.routing.calibration import (
    OUTPUTS_FILE,
    SAMPLE_FILE,
    TOGGLES_FILE,
    Calibration,
    null_path,
)
from moe_routing.routing.nulls import diagnose, fit_null, save_null
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.toggles import Toggles
from moe_routing.schema import parse
from moe_routing.statistics.study_tables import write_statistics
from moe_routing.vocabulary import DATASETS
from moe_routing.workflow import write_config

ROOT = Path(__file__).resolve().parents[2]
DATA_FILES = ROOT / "tests" / "data_files"
LAYERS, EXPERTS = 4, 64
RULE = ModelRule(8, "softmax")
ANALYSIS = {
    "baseline": {"tokens": 200, "domain_tokens": 100, "prompts": ["The capital of France is"]},
    "bh": {
        "tokens": 200, "max_k": [8, 64], "alpha": [0.05, 0.10],
        "fewer_k": [4], "prompt": "The theory of", "new_tokens": 2,
    },
}  # fmt: skip
"""Analyses so small that they take seconds."""

STRATEGIES = (
    "stock", "regular_k4", "regular_k8", "normalized_k8", "uniform_k8", "adaptive_k8",
    "bh_k8_a001", "bh_k8_a005", "bh_k16_a005", "bh_k64_a005",
)  # fmt: skip
EFFECTS = {"bh_k8_a005": -0.03, "bh_k16_a005": 0.03, "uniform_k8": -0.06, "regular_k4": -0.10}
"""A known loss, a known gain; every other strategy has a known zero; ``regular_k8`` is the
baseline ``stock`` under another id."""

CONTROLS = {
    "regular_k1": -0.20, "regular_k64": -0.15, "shuffle.bh_k8_a005": -0.09,
    "layermean.bh_k8_a005": -0.03, "randomid.bh_k8_a005": -0.25, "bh_k8_a005_mass-matched": 0.0,
    "randomid.bh_k8_a005_mass-matched": -0.25, "topp_k8_p050": -0.20,
}  # fmt: skip
"""Effects against the stock model; bh_k8_a005 itself has -0.03, so that layer means equal it."""

NOISE = {"eager": 0, "bfloat16": 3}
"""Items that the numerics of each arm turn wrong, and as many right; 0 changes nothing at all."""

NOISE_NATS = 0.002
"""Loss of the second arm on text, nats per token."""

NATS_OF_ACCURACY = 1.0
"""A planted accuracy effect of 0.03 comes with 0.03 nats per token."""


def planted_config(
    *,
    strategies: tuple[str, ...] = STRATEGIES,
    datasets: tuple[str, ...] = ("wikipedia", "hellaswag", "lambada"),
    primary: tuple[str, str] = ("bh_k8_a005", "hellaswag"),
    model: dict | None = None,
    study: str = "planted",
    nulls: tuple[str, ...] = ("needed",),
    beside: bool = False,
    main: Mapping[str, str] | None = None,
    **parts: object,
) -> StudyConfig:
    """A valid config; its sources are never read. With ``beside``: controls and numerics arms.

    ``main`` are main metrics of sets; ``parts`` replace sections: controls, budgets, statistics.
    """
    local = {"kind": "local", "path": "nowhere.jsonl"}
    values = {
        "study": study,
        "seed": 3,
        "model": model or {"path": str(ROOT / "resources" / "olmoe-nano")},
        "analysis": {"resamples": 400, **ANALYSIS, "bh": {**ANALYSIS["bh"], "nulls": list(nulls)}},
        "calibration": {"source": local, "tokens": 1024, "nulls": list(nulls)},
        "datasets": {
            name: {"source": local, "main_metric": (main or {}).get(name)} for name in datasets
        },
        "strategies": list(strategies),
        "statistics": {
            "primary": {"strategy": primary[0], "dataset": primary[1]},
            "resamples": 400,
        },
    }
    if beside:
        values["controls"] = list(CONTROLS)
        values["numerics"] = [
            {"name": "eager", "experts_implementation": "eager"},
            {"name": "bfloat16", "dtype": "bfloat16"},
        ]
    return parse(StudyConfig, values | parts, "planted config")


@contextmanager
def figures_as_dots() -> Iterator[None]:
    """Make figures, but write a dot in place of each: to write them takes most of the time."""

    def save(figure, path, suffixes=("png",)):
        plt.close(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        imsave(path.with_name(f"{path.name}.png"), np.zeros((1, 1)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_routing.figures.series.save", save)
        patch.setattr("moe_routing.reporting.plots.save", save)
        yield


def make_study(folder, config, effects=None, **options):
    """Write a planted study with tables and statistics, and read it."""
    write_results(folder, config, effects, **options)
    write_tables(config, folder)
    write_statistics(config, folder)
    return StudyResults.load(folder)


def write_results(
    folder: Path,
    config: StudyConfig,
    effects: dict[str, float] | None = None,
    *,
    items: int = 1500,
    numerics: float = 0.01,
    parameters: int = 15_868_032,
) -> Path:
    """Write config.yaml, model.json, data/ and every cell.

    Args:
        folder: results folder.
        config: study.
        effects: strategy to its effect on accuracy (0.03: 3 points better than the baseline, on
            exactly that proportion of items; as many nats per token better on text). Others have 0.
        items: items of each set; a tenth as many documents of text.
        noise: proportion of items that flip each way, in equal numbers, in every strategy.
        parameters: size of the model, as model.json states it.
    """
    write_config(config, folder / "config.yaml")
    _write_json(folder / "model.json", _model(config, parameters))
    _write_json(folder / "data" / "calibration.json", {"documents": 40, "tokens": 1024})
    rng = np.random.default_rng(config.seed)
    baseline = config.parsed[config.statistics.baseline].resolved(RULE)
    for name in config.datasets:
        base = _base_items(name, items, rng)
        _write_json(folder / "data" / f"{name}.json", {"items": len(base)})
        for strategy_id in config.scored_on(name):
            effect = (CONTROLS | (effects or {})).get(strategy_id, 0.0)
            same = config.parsed[strategy_id].resolved(RULE) == baseline
            shifted = base if same else _shift(base, DATASETS[name].task, effect, numerics, rng)
            _write_cell(folder, config, strategy_id, name, shifted, abs(effect) / 10)
        for arm in config.numerics:
            path = folder / "numerics" / arm.name / f"{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            shaken = _shake(base, DATASETS[name].task, NOISE[arm.name], rng)
            with_gold(shaken).to_parquet(path, index=False)
    _write_efficiency(folder, config)
    return folder


def _write_efficiency(folder: Path, config: StudyConfig) -> None:
    """Write times in proportion to the cap on experts, and distinct experts of batches."""
    names = [name for name in config.scored if config.parsed[name].family.control is None]
    cap = {name: config.parsed[name].resolved(RULE).max_experts for name in names}
    times = [
        {"strategy": name, "repeat": r, "seconds": (1 + 0.1 * cap[name]) * (1 + r / 50),
         "tokens": 1000}
        for r in range(5)
        for name in names
    ]  # fmt: skip
    experts = [
        {"strategy": name, "batch_size": size, "layer": layer, "draws": 3,
         "unique_experts": EXPERTS * (1 - (1 - cap[name] / EXPERTS) ** size)}
        for name in names
        for size in (1, 4, 16)
        for layer in range(LAYERS)
    ]  # fmt: skip
    for path, rows in ((TIMING_FILE, times), (UNIQUE_FILE, experts)):
        (folder / path).parent.mkdir(exist_ok=True)
        pd.DataFrame(rows).to_csv(folder / path, index=False)


def _shake(base: pd.DataFrame, task: str, flips: int, rng: np.random.Generator) -> pd.DataFrame:
    """Return the baseline under other numerics."""
    if not flips:
        return base
    if task == "perplexity":
        nats = NOISE_NATS * base["tokens"]
        return base.assign(log_likelihood=base["log_likelihood"] - nats)
    # As many lost as gained but one, so that a difference is left.
    correct = base["greedy"].to_numpy(copy=True)
    right, wrong = (rng.permutation(np.flatnonzero(correct == side)) for side in (True, False))
    correct[right[:flips]], correct[wrong[: flips - 1]] = False, True
    names = [name for name in ("correct", "correct_norm", "greedy") if base[name].notna().any()]
    return base.assign(
        log_likelihood=base["log_likelihood"] - 0.001, **dict.fromkeys(names, correct)
    )


def _model(config: StudyConfig, parameters: int) -> dict:
    return {
        "path": config.model.path,
        "revision": config.model.revision,
        "architecture": "OlmoeForCausalLM",
        "num_layers": LAYERS,
        "num_experts": EXPERTS,
        **asdict(RULE),
        "parameters": parameters,
        "weights_sha256": "0" * 64,
        "files": {"model.safetensors": "0" * 64},
    }


def _base_items(name: str, items: int, rng: np.random.Generator) -> pd.DataFrame:
    text = DATASETS[name].task == "perplexity"
    n = max(40, items // 10) if text else items
    tokens = rng.integers(80, 200, n) if text else np.ones(n, int)
    correct = np.arange(n) < round(0.55 * n)
    rng.shuffle(correct)
    answers = None if text else correct
    return pd.DataFrame(
        {
            "id": [f"{name}-{i}" for i in range(n)],
            "cluster": [f"{name}-{i}" for i in range(n)],
            "log_likelihood": -tokens * rng.normal(3.0, 0.2, n),
            "tokens": tokens,
            "words": tokens,
            "bytes": tokens * 5,
            "correct": answers,
            "correct_norm": answers if DATASETS[name].task == "multiple_choice" else None,
            "greedy": correct,
            "mean_experts": 8.0,
        }
    )


def _shift(
    base: pd.DataFrame, task: str, effect: float, numerics: float, rng: np.random.Generator
) -> pd.DataFrame:
    items, n = base.copy(), len(base)
    nats = rng.normal(0, numerics, n)
    nats -= np.average(nats, weights=items["tokens"])
    items["log_likelihood"] += (nats + effect * NATS_OF_ACCURACY) * items["tokens"]
    if task == "perplexity":
        return items
    correct = base["greedy"].to_numpy(copy=True)
    right, wrong = (rng.permutation(np.flatnonzero(correct == side)) for side in (True, False))
    both, extra = round(numerics * n), round(effect * n)
    correct[right[: both + max(0, -extra)]] = False
    correct[wrong[: both + max(0, extra)]] = True
    for column in ("correct", "correct_norm", "greedy"):
        if base[column].notna().any():
            items[column] = correct
    return items


def _write_cell(
    folder: Path,
    config: StudyConfig,
    strategy_id: str,
    dataset: str,
    items: pd.DataFrame,
    divergence: float,
) -> None:
    strategy = parse_strategy(strategy_id).resolved(RULE)
    routing = _routing(strategy.min_experts, strategy.max_experts, int(items["tokens"].sum()))
    items = with_gold(items).assign(mean_experts=routing.mean_experts())
    if config.evaluation.kl_items:
        items = items.assign(kl=_divergences(items["tokens"], divergence))
    seconds = 0.5 + 0.05 * routing.mean_experts()
    record = {
        "schema_version": 2,
        "study": config.study,
        "strategy": specification(parse_strategy(strategy_id), RULE, _fitted(config, folder)),
        "dataset": dataset,
        "task": DATASETS[dataset].task,
        "n_items": len(items),
        "routing": {
            "tokens": routing.tokens,
            "mean_experts": routing.mean_experts(),
            "sd_experts": routing.sd_experts(),
            "floor_proportion": float(routing.floor_binds_L.mean()),
            "cap_proportion": float(routing.cap_binds_L.mean()),
            "empty_proportion": float(routing.empty_L.mean()),
            "router_entropy": float(routing.entropy_L.mean()),
            "max_weight": float(routing.max_probability_L.mean()),
            "by_layer": routing.by_layer(),
        },
        "timings": {"wall_seconds": seconds, "tokens_per_second": routing.tokens / seconds},
        "provenance": {
            "path": config.model.path, "revision": "", "dtype": "float32", "device": "cpu (x86_64)",
            "experts_implementation": "dropless", "router_fingerprint": "f" * 64,
            "weights_sha256": "0" * 64, "data_sha256": "1" * 64, "seed": config.seed,
            "token_budget": config.evaluation.token_budget,
            "python": "3.11.0", "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
            "commit": "unknown", "code": "0" * 16, "threads": 1,
        },
    }  # fmt: skip
    path = folder / "cells" / strategy_id / dataset
    _write_json(path.with_suffix(".json"), record)
    items.to_parquet(path.with_suffix(".parquet"), index=False)


def _fitted(config: StudyConfig, folder: Path) -> Calibration:
    """Return a calibration in which every budget is fitted, and write the fits."""
    budgets = {}
    for name in config.budgeted:
        fit = Budget(name, "threshold", 0.1, 4.5, 4.5, (4.5,) * LAYERS, 1024, "fitted")
        fit.save(budget_path(folder / "calibration", name))
        budgets[name] = fit
    return cast("Calibration", SimpleNamespace(budgets=budgets))


def _divergences(tokens: pd.Series, value: float) -> pd.Series:
    """The planted divergence of each item: ``value`` nats per token over all of them."""
    uneven = tokens * np.where(np.arange(len(tokens)) % 2, 0.9, 1.1)
    return uneven * (value * tokens.sum() / uneven.sum())


def _routing(low: int, high: int, tokens: int) -> RoutingStatistics:
    """Counts that rise evenly from ``low`` to ``high`` over the layers."""
    histogram = np.zeros((LAYERS, EXPERTS + 1), int)
    for layer, count in enumerate(np.linspace(low, min(high, low + 12), LAYERS).round()):
        histogram[layer, int(count)] = tokens
    empty = np.linspace(0.4, 0.1, LAYERS) if low < high else np.zeros(LAYERS)
    return RoutingStatistics(
        tokens=tokens,
        forwards=10,
        count_histogram_LC=histogram,
        load_LE=np.full((LAYERS, EXPERTS), tokens * low // EXPERTS),
        entropy_L=np.linspace(3.5, 2.0, LAYERS),
        max_probability_L=np.linspace(0.1, 0.3, LAYERS),
        selected_mass_L=np.linspace(0.4, 0.8, LAYERS),
        floor_binds_L=empty,
        cap_binds_L=np.zeros(LAYERS),
        empty_L=empty,
        unique_experts_L=np.full(LAYERS, 60.0),
    )


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def add_analyses(
    study: StudyResults, nano: LoadedModel, outputs: ExpertOutputs, toggles: Toggles
) -> None:
    """Calibrate, and run the baseline and BH analyses for real on a few words of real text."""
    config, folder = study.config, study.folder
    real = describe_checkpoint(config.model)
    planted = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    _write_json(folder / "model.json", planted | {k: real[k] for k in ("files", "settings")})
    for name in config.datasets:
        items = load_items(name, DATA_FILES / f"{name}.jsonl")
        write_items(items[:4], folder / "data" / f"{name}.parquet")
    sample = sample_router_logits(
        nano.model, nano.tokenizer, texts(), tokens=512, window=128, rng=np.random.default_rng(0)
    )
    sample.save(folder / "calibration" / SAMPLE_FILE)
    outputs.save(folder / "calibration" / OUTPUTS_FILE)
    toggles.save(folder / "calibration" / TOGGLES_FILE)
    for name in config.analysis.bh.nulls:
        null = fit_null(name, sample, toggles)
        path = null_path(folder / "calibration", name)
        save_null(null, sample, path, toggles)
        diagnose(null, Calibration(sample)).to_csv(path.with_suffix(".csv"), index=False)
    write_baseline(config, folder)
    write_bh(config, folder)


def texts() -> list[str]:
    """Return real calibration text, by passage."""
    return (DATA_FILES / "calibration.txt").read_text(encoding="utf-8").split("\n\n")
