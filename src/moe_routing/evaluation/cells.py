"""Cells: one strategy on one evaluation set, scored item by item."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd

from moe_routing.data.items import Item, fingerprint, read_items
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.recorder import Recorder, RoutingStatistics
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Score, Scorer
from moe_routing.errors import InputError
from moe_routing.evaluation.divergence import BaselineDivergence, divergence_subset
from moe_routing.evaluation.record import (
    SCHEMA_VERSION,
    CellRecord,
    Provenance,
    RoutingSummary,
    Timings,
    environment,
    specification,
)
from moe_routing.evaluation.study_model import load_study_model
from moe_routing.files import atomic_path
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import Strategy, parse_strategy
from moe_routing.statistics.estimate import Estimate
from moe_routing.statistics.intervals import divergence_interval, metric_intervals
from moe_routing.vocabulary import DATASETS

if TYPE_CHECKING:
    from moe_routing.config.study import StudyConfig


@dataclass(frozen=True)
class EvaluationSet:
    """An evaluation set as prepared for a study: read once per job.

    Attributes:
        name: name of the set.
        items: its items, in their order.
        sha256: hash of the items.
    """

    name: str
    items: list[Item]
    sha256: str

    @property
    def task(self) -> str:
        """How the items are scored."""
        return DATASETS[self.name].task

    @classmethod
    def read(cls, results: Path, name: str) -> EvaluationSet:
        """Read the items of a set.

        Raises:
            InputError: see :func:`moe_routing.data.items.read_items`.
        """
        items = read_items(results / "data" / f"{name}.parquet")
        return cls(name, items, fingerprint(items))


@dataclass(frozen=True)
class ScoredItems:
    """The scores of some items under a strategy.

    Attributes:
        items: one row per item.
        statistics: how the strategy routed.
        seconds: wall-clock time of scoring.
    """

    items: pd.DataFrame
    statistics: RoutingStatistics
    seconds: float


def evaluate_strategies(
    config: StudyConfig,
    results: Path,
    strategy_ids: Iterable[str],
    datasets: Iterable[str] | None = None,
) -> None:
    """Score strategies on evaluation sets and write ``cells/<strategy>/<dataset>.*``.

    The model is loaded once for all of them, and the baseline's predictions are made once for all
    divergences from them. Strategies that are the same routing on this model are scored once. A
    cell does not depend on what was scored before it.

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
        dataset = EvaluationSet.read(results, name)
        _evaluate_on(dataset, strategies, loaded, config, calibration, results / "cells")


def _evaluate_on(
    dataset: EvaluationSet,
    strategies: Sequence[Strategy],
    loaded: LoadedModel,
    config: StudyConfig,
    calibration: Calibration | None,
    cells: Path,
) -> None:
    """Write the cells of one evaluation set."""
    started = time.perf_counter()
    rule, name = loaded.rule, dataset.name
    baseline = config.parsed[config.statistics.baseline]
    subset = divergence_subset(dataset.items, name, config)
    # The baseline's pass also warms the model up, whichever strategy is timed first.
    divergence = BaselineDivergence(loaded, subset, dataset.task, config, calibration)
    baseline_seconds = (time.perf_counter() - started) / len(strategies)
    done: dict[str, tuple[pd.DataFrame, CellRecord]] = {}
    if baseline not in strategies:
        path = cells / baseline.id / name
        done |= _finished(path, baseline.resolved(rule).id, dataset, loaded, config)
    for strategy in strategies:
        routing = strategy.resolved(rule).id
        if routing not in done:
            scored = score_items(loaded, strategy, dataset.items, name, config, calibration)
            started = time.perf_counter()
            kl = scored.items["id"].map(divergence.of(strategy)).astype(float)
            seconds = time.perf_counter() - started + baseline_seconds
            scored = replace(scored, items=scored.items.assign(kl=kl))
            record = cell_record(
                loaded, strategy, dataset, scored, config, divergence_seconds=seconds
            )
            done[routing] = scored.items, record
        items, record = done[routing]
        record = replace(record, strategy=specification(strategy, rule))
        write_cell(cells / strategy.id / name, items, record)
        _report(record)


def _finished(
    path: Path, routing: str, dataset: EvaluationSet, loaded: LoadedModel, config: StudyConfig
) -> dict[str, tuple[pd.DataFrame, CellRecord]]:
    """Return a cell that an earlier job wrote with the same provenance, by its routing, if any."""
    if not path.with_suffix(".json").is_file():
        return {}
    record = CellRecord.read(path.with_suffix(".json"))
    if record.provenance != _provenance(loaded, dataset, config):
        return {}
    return {routing: (pd.read_parquet(path.with_suffix(".parquet")), record)}


def _report(record: CellRecord) -> None:
    """Write to the log that a cell is done."""
    speed = f"{record.timings.tokens_per_second:,.0f} tokens/s"
    cell = f"{record.strategy['id']} on {record.dataset}"
    print(f"{cell}: {record.n_items:,} items, {speed}", file=sys.stderr, flush=True)


def load_calibration(results: Path, *strategies: Strategy) -> Calibration | None:
    """Return the calibration that strategies need, or None."""
    if not any(strategy.uses_calibration for strategy in strategies):
        return None
    return Calibration.for_strategies(results / "calibration", *strategies)


def score_items(
    loaded: LoadedModel,
    strategy: Strategy,
    items: list[Item],
    dataset: str,
    config: StudyConfig,
    calibration: Calibration | None,
) -> ScoredItems:
    """Score items of an evaluation set under a strategy.

    Raises:
        InputError: router logits or likelihoods that are not finite.
    """
    task = DATASETS[dataset].task
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
        scores = scorer.score_items(items, task, label=f"{strategy.id} on {dataset}")
    seconds = time.perf_counter() - started
    statistics = recorder.statistics()
    statistics.check_finite(f"{strategy.id} on {dataset}")
    return ScoredItems(pd.DataFrame(_rows(items, scores, task)), statistics, seconds)


def _rows(items: list[Item], scores: list[list[Score]], task: str) -> list[dict]:
    """Return the item table by the definitions of lm-evaluation-harness.

    ``correct``: the best continuation by log-likelihood (multiple choice) or greedy decoding
    (last word); ``correct_norm``: the best by log-likelihood per character of the continuation;
    ``gold_bits_per_byte``: -log2 likelihood of the right one per UTF-8 byte, without the delimiter
    before it; ``gold_margin``: its log-likelihood minus that of the best wrong one.
    """
    rows = []
    for item, item_scores in zip(items, scores, strict=True):
        likelihood = np.array([score.log_likelihood for score in item_scores])
        experts = [cast("float", score.mean_experts) for score in item_scores]  # all recorded
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
            "gold_bytes": None,
            "gold_bits_per_byte": None,
            "gold_margin": None,
            "log_likelihoods": likelihood.tolist(),
            "mean_experts": float(np.mean(experts)),
        }
        if task != "perplexity":
            row["gold_bytes"] = len(item.choices[gold].encode())
            row["gold_bits_per_byte"] = -likelihood[gold] / math.log(2) / row["gold_bytes"]
        if task == "multiple_choice":
            row["gold_margin"] = likelihood[gold] - np.delete(likelihood, gold).max()
            lengths = np.array([len(choice) for choice in item.choices])
            row["correct"] = bool(likelihood.argmax() == gold)
            row["correct_norm"] = bool((likelihood / lengths).argmax() == gold)
        elif task == "last_word":
            row["correct"] = row["greedy"]
        rows.append(row)
    return rows


def cell_record(
    loaded: LoadedModel,
    strategy: Strategy,
    dataset: EvaluationSet,
    scored: ScoredItems,
    config: StudyConfig,
    *,
    divergence_seconds: float | None = None,
    numerics: dict[str, str | int] | None = None,
) -> CellRecord:
    """Return the record of a cell.

    Args:
        loaded: the model.
        strategy: the strategy.
        dataset: the evaluation set.
        scored: its items under the strategy, with a column ``kl`` if divergences were measured.
        config: the study, under the settings of the job.
        divergence_seconds: time that the divergences took.
        numerics: numerics arm and what it changes, if the cell belongs to one.
    """
    return CellRecord(
        schema_version=SCHEMA_VERSION,
        study=config.study,
        strategy=specification(strategy, loaded.rule),
        dataset=dataset.name,
        task=dataset.task,
        n_items=len(scored.items),
        metrics=_estimates(scored.items, dataset.task, config),
        routing=RoutingSummary.of(scored.statistics),
        timings=Timings(
            scored.seconds, scored.statistics.tokens / scored.seconds, divergence_seconds
        ),
        provenance=_provenance(loaded, dataset, config),
        numerics=numerics,
    )


def _provenance(loaded: LoadedModel, dataset: EvaluationSet, config: StudyConfig) -> Provenance:
    return Provenance(
        **loaded.provenance | {"experts_implementation": config.model.experts_implementation},
        token_budget=config.evaluation.token_budget,
        data_sha256=dataset.sha256,
        **environment(config.seed),
    )


def _estimates(frame: pd.DataFrame, task: str, config: StudyConfig) -> tuple[Estimate, ...]:
    """Return every metric with its interval, and the divergence if it was measured."""
    confidence, resamples = config.statistics.confidence, config.statistics.resamples
    settings = {"confidence": confidence, "resamples": resamples}
    metrics = metric_intervals(frame, task, **settings, rng=np.random.default_rng(config.seed))
    if "kl" in frame:
        rng = np.random.default_rng(config.seed)
        metrics += divergence_interval(frame, **settings, rng=rng)
    return tuple(metrics)


def write_cell(path: Path, frame: pd.DataFrame, record: CellRecord) -> None:
    """Write the items of a cell as Parquet and its record as JSON."""
    with atomic_path(path.with_suffix(".parquet")) as temporary:
        frame.to_parquet(temporary, index=False)
    record.write(path.with_suffix(".json"))
