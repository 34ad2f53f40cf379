"""Cells: one strategy on one evaluation set, scored item by item."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_routing.data.items import Item, fingerprint, read_items
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.recorder import Recorder, RoutingStatistics
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Score, Scorer
from moe_routing.errors import InputError
from moe_routing.evaluation.divergence import BaselineDivergence, divergence_subset
from moe_routing.evaluation.provenance import environment
from moe_routing.evaluation.study_model import load_study_model
from moe_routing.files import atomic_path
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import Strategy, parse_strategy
from moe_routing.statistics.intervals import Estimate, divergence_interval, metric_intervals
from moe_routing.vocabulary import DATASETS

if TYPE_CHECKING:
    from moe_routing.config.study import StudyConfig

SCHEMA_VERSION = 1


def evaluate_strategies(
    config: StudyConfig,
    results: Path,
    strategy_ids: Iterable[str],
    datasets: Iterable[str] | None = None,
) -> None:
    """Score strategies on evaluation sets and write ``cells/<strategy>/<dataset>.*``.

    The model is loaded once for all of them, and the baseline's predictions are made once for all
    divergences from them. A cell does not depend on what was scored before it.

    Raises:
        InputError: an unknown strategy or set, or non-finite router logits.
    """
    strategies = [parse_strategy(strategy_id) for strategy_id in strategy_ids]
    names = list(datasets or config.datasets)
    unknown = [name for name in names if name not in config.datasets]
    if unknown:
        raise InputError(f"dataset '{unknown[0]}'; allowed: {', '.join(config.datasets)}")
    baseline = config.parsed[config.statistics.baseline]
    calibration = load_calibration(results, *strategies, baseline)
    loaded = load_study_model(config.model, results, config.resources.threads)
    for name in names:
        started = time.perf_counter()
        items = divergence_subset(read_items(_items_file(results, name)), name, config)
        # Read first, it warms the model up for whichever strategy is timed first.
        divergence = BaselineDivergence(loaded, items, DATASETS[name].task, config, calibration)
        baseline_seconds = time.perf_counter() - started
        for strategy in strategies:
            frame, record = score_dataset(loaded, strategy, name, config, results, calibration)
            started = time.perf_counter()
            frame["kl"] = frame["id"].map(divergence.of(strategy)).astype(float)
            record["timings"]["divergence_seconds"] = (
                time.perf_counter() - started + baseline_seconds / len(strategies)
            )
            record["metrics"] += [asdict(estimate) for estimate in _divergence(frame, config)]
            write_cell(results / "cells" / strategy.id / name, frame, record)
            _report(record)


def _report(record: dict) -> None:
    """Tell whoever follows the log that a cell is done."""
    speed = f"{record['timings']['tokens_per_second']:,.0f} tokens/s"
    cell = f"{record['strategy']['id']} on {record['dataset']}"
    print(f"{cell}: {record['n_items']:,} items, {speed}", file=sys.stderr, flush=True)


def load_calibration(results: Path, *strategies: Strategy) -> Calibration | None:
    """Return what strategies need to know of the model beforehand; None if none needs anything."""
    if not any(strategy.needs_calibration for strategy in strategies):
        return None
    nulls = dict.fromkeys(strategy.needs_null for strategy in strategies)
    return Calibration.load(results / "calibration", tuple(null for null in nulls if null))


def score_dataset(
    loaded: LoadedModel,
    strategy: Strategy,
    dataset: str,
    config: StudyConfig,
    results: Path,
    calibration: Calibration | None,
) -> tuple[pd.DataFrame, dict]:
    """Return the item table of a strategy on an evaluation set, and the record of the cell.

    Raises:
        InputError: no items, or router logits or likelihoods that are not finite.
    """
    items = read_items(_items_file(results, dataset))
    frame, statistics, seconds = score_items(
        loaded, strategy, items, DATASETS[dataset].task, config, calibration, label=dataset
    )
    record = _record(config, strategy, dataset, frame, statistics, seconds)
    record["provenance"] = {
        **loaded.provenance,
        "experts_implementation": config.model.experts_implementation,
        "token_budget": config.evaluation.token_budget,
        "data_sha256": fingerprint(items),
        **environment(config.seed),
    }
    return frame, record


def _items_file(results: Path, dataset: str) -> Path:
    return results / "data" / f"{dataset}.parquet"


def score_items(
    loaded: LoadedModel,
    strategy: Strategy,
    items: list[Item],
    task: str,
    config: StudyConfig,
    calibration: Calibration | None,
    label: str,
) -> tuple[pd.DataFrame, RoutingStatistics, float]:
    """Return one row per item, the routing statistics, and the wall seconds of scoring."""
    recorder = Recorder()
    scorer = Scorer(
        loaded.model,
        loaded.tokenizer,
        token_budget=config.evaluation.token_budget,
        window=config.evaluation.window,
        recorder=recorder,
    )
    implementation = config.model.experts_implementation
    started = time.perf_counter()
    with routed(
        loaded.model,
        strategy,
        calibration=calibration,
        recorder=recorder,
        experts_implementation=implementation,
    ):
        scores = scorer.score_items(items, task, label=f"{strategy.id} on {label}")
    seconds = time.perf_counter() - started
    statistics = recorder.statistics()
    statistics.check_finite(f"{strategy.id} on {label}")
    return pd.DataFrame(_rows(items, scores, task)), statistics, seconds


def _rows(items: list[Item], scores: list[list[Score]], task: str) -> list[dict]:
    """Return the item table by the definitions of lm-evaluation-harness.

    ``correct``: the best continuation by log-likelihood (multiple choice) or greedy decoding
    (last word); ``correct_norm``: the best by log-likelihood per character of the continuation.
    """
    rows = []
    for item, item_scores in zip(items, scores, strict=True):
        likelihood = np.array([score.log_likelihood for score in item_scores])
        gold = item.label or 0
        row = {
            "id": item.id,
            "cluster": item.cluster,
            "log_likelihood": likelihood[gold],
            "tokens": item_scores[gold].tokens,
            "words": item.words,
            "bytes": item.bytes,
            "correct": None,
            "correct_norm": None,
            "greedy": item_scores[gold].greedy,
            "mean_experts": float(np.mean([score.mean_experts for score in item_scores])),
        }
        if task == "multiple_choice":
            lengths = np.array([len(choice) for choice in item.choices])
            row["correct"] = bool(likelihood.argmax() == gold)
            row["correct_norm"] = bool((likelihood / lengths).argmax() == gold)
        elif task == "last_word":
            row["correct"] = row["greedy"]
        rows.append(row)
    return rows


def _record(
    config: StudyConfig,
    strategy: Strategy,
    dataset: str,
    frame: pd.DataFrame,
    statistics: RoutingStatistics,
    seconds: float,
) -> dict:
    rng = np.random.default_rng(config.seed)
    estimates = metric_intervals(
        frame,
        DATASETS[dataset].task,
        confidence=config.statistics.confidence,
        resamples=config.statistics.resamples,
        rng=rng,
    )
    specification = {"id": strategy.id, "family": strategy.family.name, **strategy.model_dump()}
    return {
        "schema_version": SCHEMA_VERSION,
        "study": config.study,
        "strategy": {**specification, "weighting": strategy.weighting_kind},
        "dataset": dataset,
        "task": DATASETS[dataset].task,
        "n_items": len(frame),
        "metrics": [asdict(estimate) for estimate in estimates],
        "routing": {
            "tokens": statistics.tokens,
            "mean_experts": statistics.mean_experts(),
            "sd_experts": statistics.sd_experts(),
            "floor_proportion": float(statistics.floor_binds_L.mean()),
            "cap_proportion": float(statistics.cap_binds_L.mean()),
            "empty_proportion": float(statistics.empty_L.mean()),
            "router_entropy": float(statistics.entropy_L.mean()),
            "max_weight": float(statistics.max_probability_L.mean()),
            "by_layer": statistics.by_layer(),
        },
        "timings": {"wall_seconds": seconds, "tokens_per_second": statistics.tokens / seconds},
    }


def _divergence(frame: pd.DataFrame, config: StudyConfig) -> list[Estimate]:
    return divergence_interval(
        frame,
        confidence=config.statistics.confidence,
        resamples=config.statistics.resamples,
        rng=np.random.default_rng(config.seed),
    )


def write_cell(path: Path, frame: pd.DataFrame, record: dict) -> None:
    """Write the items of a cell as Parquet and its record as JSON."""
    with atomic_path(path.with_suffix(".parquet")) as temporary:
        frame.to_parquet(temporary, index=False)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
