"""Cells: one strategy on one evaluation set, scored item by item."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from moe_routing.config.cells import (
    CALIBRATION_TEXT,
    CELLS,
    SAMPLE,
    SCHEMA_VERSION,
    Cell,
    arm_of,
    base_cell,
    cells_of,
    data_file,
    strategy_of,
    study_of,
)
from moe_routing.config.study import ModelConfig, StudyConfig
from moe_routing.data.items import Item, fingerprint, read_items
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.recorder import Recorder, RoutingStatistics
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Score, Scorer
from moe_routing.evaluation.divergence import BaselineDivergence, divergence_subset, states_of
from moe_routing.evaluation.pieces import cell_piece, fitted_pieces
from moe_routing.evaluation.record import (
    CellRecord,
    Provenance,
    RoutingSummary,
    Timings,
    environment,
    specification,
)
from moe_routing.evaluation.store import Piece, Store, currency, eligible, with_suffix
from moe_routing.evaluation.study_model import load_study_model
from moe_routing.files import atomic_path, read_parquet, save_json
from moe_routing.routing.budget import left_out
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import Strategy
from moe_routing.routing.strategies.controls import EqualBudget
from moe_routing.vocabulary import DATASETS


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
        items = read_items(results / data_file(name))
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


def complete_cell(
    config: StudyConfig, results: Path, cell: Cell, *, most: int | None = None
) -> None:
    """Write the files of a cell, which is scored unless an earlier job has done so.

    Others are scored in passing: those whose inputs are certain to be up to date, under the same
    loaded model. A cell does not depend on what was scored before it.

    Args:
        config: the study.
        results: folder of the study.
        cell: the cell.
        most: most cells to score; None: as the config says.

    Raises:
        InputError: an input is missing, non-finite router logits, or a changed model.
    """
    job = ScoringJob(config, results, cell)
    job.store.finish(job.own, job.others, job.score, most or config.resources.strategies_per_job)
    job.store.deliver(job.own)


class ScoringJob:
    """Scores cells; what they share is loaded when a cell needs it."""

    def __init__(self, config: StudyConfig, results: Path, cell: Cell) -> None:
        """Find the cells that may be scored in passing; load nothing yet."""
        self.config, self.results = config, results
        self.store = Store(results)
        cells = list(cells_of(config))
        place = cells.index(cell)
        # Jobs that start with different cells go on with different ones, too; their own set first.
        following = sorted(
            [*cells[place:], *cells[:place]], key=lambda other: other.dataset != cell.dataset
        )
        self._cells = {cell_piece(config, other): other for other in following}
        self.own, *_ = self._cells
        known = {*self.own.files}
        if SAMPLE in self.own.files:
            # Logits are sampled on text that is drawn apart from the sets, after they are prepared.
            sets = (data_file(name) for name in config.datasets)
            known |= {CALIBRATION_TEXT, *(name for name in sets if (results / name).is_file())}
        self.store.path(self.own)  # an input that is missing is the own cell's
        scored = {f"{piece.path}.json": piece for piece in self._cells}
        current = currency(self.store, known, {**fitted_pieces(config), **scored})
        self.others = [
            piece
            for piece in eligible(self.own, self._cells, current)
            if self._model_of(piece) == self._model_of(self.own) and not self.store.has(piece)
        ]
        self._sets: dict[str, EvaluationSet] = {}
        self._divergences: dict[str, BaselineDivergence] = {}

    def _model_of(self, piece: Piece) -> ModelConfig:
        """Return the model that a cell is scored on; the experts' implementation may vary."""
        model = study_of(self.config, self._cells[piece]).model
        return model.model_copy(
            update={"experts_implementation": self.config.model.experts_implementation}
        )

    @cached_property
    def _loaded(self) -> LoadedModel:
        model = self._model_of(self.own)
        return load_study_model(model, self.results, self.config.resources.threads)

    @cached_property
    def _calibration(self) -> Calibration | None:
        cells = [self._cells[piece] for piece in (self.own, *self.others)]
        names = dict.fromkeys(strategy_of(self.config, cell) for cell in cells)
        if any(cell.part == CELLS for cell in cells):
            names[self.config.statistics.baseline] = None
        return load_calibration(self.results, *(self.config.parsed[name] for name in names))

    def _set(self, name: str) -> EvaluationSet:
        """Return the items of a set.

        Raises:
            InputError: the set was prepared again since the job began.
        """
        if name not in self._sets:
            data = EvaluationSet.read(self.results, name)
            self.store.check_unchanged(data_file(name))
            self._sets[name] = data
        return self._sets[name]

    def _divergence(self, name: str) -> BaselineDivergence:
        """Return the divergence from the baseline on a set, whose baseline is run once."""
        if name not in self._divergences:
            data = self._set(name)
            subset = divergence_subset(data.items, name, self.config)
            others = iter(self._divergences.values())
            exact = next((other.packable for other in others), None)
            self._divergences[name] = BaselineDivergence(
                self._loaded, subset, data.task, self.config, self._calibration, exact
            )
        return self._divergences[name]

    def score(self, piece: Piece, path: Path) -> None:
        """Score a cell and write it, or copy the cell of the same routing under another id."""
        cell = self._cells[piece]
        strategy = self.config.parsed[strategy_of(self.config, cell)]
        if reasons := left_out(self.results / "calibration", [strategy]):
            write_left_out(path, reasons[strategy.id])
            return
        same = self._same_routing(piece, cell, strategy)
        if same is not None:
            path_of_same = self.store.path(same)
            items = read_parquet(with_suffix(path_of_same, ".parquet"))
            record = CellRecord.read(with_suffix(path_of_same, ".json"))
            own = specification(strategy, self._loaded.rule, self._calibration)
            record = replace(record, strategy=own)
        else:
            items, record = self._score(cell, strategy)
        write_cell(path, items, record)
        _report(record, cell)

    def _same_routing(self, piece: Piece, cell: Cell, strategy: Strategy) -> Piece | None:
        """Return the finished cell of a strategy that is the same routing on this model, if any.

        Otherwise it is finished here first, if it may be: the baseline before the other.
        """
        if cell.part != CELLS:
            return None
        rule = self._loaded.rule
        standing = self.config.duplicates(rule).get(strategy.id)
        if standing is None:
            return None
        other = cell_piece(self.config, cell._replace(name=standing))
        if not eligible(piece, [other], lambda _: False):
            return None
        self.store.finish(other, [], self.score, 1)
        return other

    def _score(self, cell: Cell, strategy: Strategy) -> tuple[pd.DataFrame, CellRecord]:
        config, arm = study_of(self.config, cell), arm_of(self.config, cell)
        data, loaded, calibration = self._set(cell.dataset), self._loaded, self._calibration
        if isinstance(strategy, EqualBudget):
            strategy = strategy.like(self._base_histogram(cell))
        if arm is not None:
            scored = score_items(loaded, strategy, data.items, data.name, config, calibration)
            numerics = {"arm": arm.name, **arm.changes}
            return scored.items, cell_record(
                loaded, strategy, data, scored, config, calibration, numerics=numerics
            )
        # The baseline's pass also warms the model up, whichever strategy is timed first.
        scored = score_items(
            loaded,
            strategy,
            data.items,
            data.name,
            config,
            calibration,
            self._divergence(data.name),
        )
        return scored.items, cell_record(loaded, strategy, data, scored, config, calibration)

    def _base_histogram(self, cell: Cell) -> list[list[int]]:
        """Return the numbers of experts of a control's base on this set, as delivered."""
        base = cast("Cell", base_cell(self.config, cell))
        record = CellRecord.read(self.results / f"{base.path}.json")
        return record.routing.by_layer["count_histogram"]


def _report(record: CellRecord, cell: Cell) -> None:
    """Write to the log that a cell is done."""
    speed = f"{record.timings.tokens_per_second:,.0f} tokens/s"
    print(f"{cell.path}: {record.n_items:,} items, {speed}", file=sys.stderr, flush=True)


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
    divergence: BaselineDivergence | None = None,
) -> ScoredItems:
    """Score items of an evaluation set under a strategy.

    Args:
        loaded: the model.
        strategy: the strategy.
        items: the items.
        dataset: name of their set.
        config: the study.
        calibration: what the strategy needs.
        divergence: fills the column ``kl`` of some items; None: there is no such column.

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
        exact=divergence and divergence.packable,
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
        kept = divergence.ids if divergence else ()
        scores = scorer.score_items(items, task, f"{strategy.id} on {dataset}", kept)
    seconds = time.perf_counter() - started
    statistics = recorder.statistics()
    statistics.check_finite(f"{strategy.id} on {dataset}")
    table = pd.DataFrame(_rows(items, scores, task))
    if divergence:
        kl = divergence.of(strategy, states_of(items, scores))
        table = table.assign(kl=table["id"].map(kl).astype(float))
    return ScoredItems(table, statistics, seconds)


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
        gold = item.right
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
    calibration: Calibration | None = None,
    *,
    numerics: dict[str, str | int] | None = None,
) -> CellRecord:
    """Return the record of a cell.

    Args:
        loaded: the model.
        strategy: the strategy.
        dataset: the evaluation set.
        scored: its items under the strategy, with a column ``kl`` if divergences were measured.
        config: the study, under the settings of the job.
        calibration: what the strategy needs.
        numerics: numerics arm and what it changes, if the cell belongs to one.
    """
    return CellRecord(
        schema_version=SCHEMA_VERSION,
        study=config.study,
        strategy=specification(strategy, loaded.rule, calibration),
        dataset=dataset.name,
        task=dataset.task,
        n_items=len(scored.items),
        routing=RoutingSummary.of(scored.statistics),
        timings=Timings(scored.seconds, scored.statistics.tokens / scored.seconds),
        provenance=_provenance(loaded, dataset, config),
        numerics=numerics,
    )


def _provenance(loaded: LoadedModel, dataset: EvaluationSet, config: StudyConfig) -> Provenance:
    return Provenance(
        **loaded.provenance | {"experts_implementation": config.model.experts_implementation},
        token_budget=config.evaluation.token_budget,
        data_sha256=dataset.sha256,
        **environment(config.seed, config.resources.threads),
    )


def write_cell(path: Path, frame: pd.DataFrame, record: CellRecord) -> None:
    """Write the items of a cell as Parquet, and then its record as JSON."""
    with atomic_path(with_suffix(path, ".parquet")) as temporary:
        frame.to_parquet(temporary, index=False)
    record.write(with_suffix(path, ".json"))


def write_left_out(path: Path, reason: str) -> None:
    """Write the files of a cell that is left out: no items, and why."""
    with atomic_path(with_suffix(path, ".parquet")) as temporary:
        pd.DataFrame({"id": [], "cluster": []}).to_parquet(temporary, index=False)
    save_json({"left_out": reason}, with_suffix(path, ".json"), indent=1)
