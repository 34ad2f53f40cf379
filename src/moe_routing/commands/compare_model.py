"""Score strategies of one model, on this package's sets and on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from moe_routing.commands.calibrate import calibrated
from moe_routing.commands.differences import difference_section, differences, explanation
from moe_routing.commands.gains import Gain, measure_gains
from moe_routing.commands.options import loaded_model, model_values, parsed_model, read_texts
from moe_routing.commands.receipt import Receipt, Section
from moe_routing.commands.samples import Sample, sample_panels
from moe_routing.commands.study import ORIGIN, local, parsed_study, study_values, task_sources
from moe_routing.config.limits import Limits, check_limits
from moe_routing.config.study import StatisticsConfig, StudyConfig
from moe_routing.data.items import fingerprint
from moe_routing.data.overlap import NGRAM, overlapping
from moe_routing.data.public import cached_file
from moe_routing.data.subset import data_rng, seeded_subset
from moe_routing.data.tasks import load_items
from moe_routing.engine.adapters import find_routers
from moe_routing.engine.requests import max_length
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError
from moe_routing.evaluation.cells import (
    EvaluationSet,
    cell_record,
    score_items,
    write_cell,
)
from moe_routing.evaluation.collect import estimates_of
from moe_routing.evaluation.divergence import BaselineDivergence, divergence_subset
from moe_routing.evaluation.record import CellRecord, environment
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import Strategy, parse_strategy
from moe_routing.routing.strategies.controls import EqualBudget
from moe_routing.schema import parse
from moe_routing.statistics.cells import Panel, ScoredCell, make_panel
from moe_routing.vocabulary import DATASETS, DIVERGENCE, METRICS

if TYPE_CHECKING:
    from moe_routing.engine.loading import LoadedModel

STUDY = "compare"


@dataclass(frozen=True)
class Plan:
    """What the command line asks for, checked before the model is loaded.

    Attributes:
        strategies: by id; the first is the baseline.
        study: the config that the sets of this package are scored under; None without any.
        sets: the items of these sets.
        harness: tasks of lm-evaluation-harness.
        calibration: a saved one.
        texts: documents to calibrate on.
        settings: tests and margins.
    """

    strategies: dict[str, Strategy]
    study: StudyConfig | None
    sets: list[EvaluationSet]
    harness: list[str]
    calibration: Calibration | None
    texts: list[str]
    settings: StatisticsConfig


@dataclass
class Scored:
    """What was scored of one of this package's sets.

    Attributes:
        items: scored items by strategy.
        records: what a study writes beside them.
    """

    items: dict[str, pd.DataFrame] = field(default_factory=dict)
    records: dict[str, CellRecord] = field(default_factory=dict)


def receipt_of_model(arguments: argparse.Namespace) -> Receipt:
    """Score what the command line asks for, and compare it with the baseline.

    Raises:
        InputError: bad input; see :func:`plan` and :func:`moe_routing.engine.routed.routed`.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = model_values(arguments)
    parsed_model(model)
    planned = plan(arguments, model)
    loaded = loaded_model(parsed_model(model))
    planned, same = _distinct(planned, loaded)
    _check_model(planned, loaded)
    calibration = planned.calibration
    if planned.texts:
        needing = [one for one in planned.strategies.values() if one.uses_calibration]
        calibration = calibrated(loaded.model, loaded.tokenizer, planned.texts, needing, arguments)
        if arguments.out is not None:
            calibration.save(arguments.out / "calibration")
    own = [one for one in planned.strategies.values() if not isinstance(one, EqualBudget)]
    for strategy in own:
        with routed(loaded.model, strategy, calibration=calibration):
            pass  # errors are raised before anything is scored
    scored = {data.name: score_set(planned, data, loaded, calibration) for data in planned.sets}
    if arguments.out is not None:
        for name, cells in scored.items():
            for strategy, record in cells.records.items():
                path = arguments.out / "cells" / strategy / name
                write_cell(path, cells.items[strategy], record)
    logged: dict[str, dict[str, Sequence[Sample]]] = {}
    if planned.harness:
        from moe_routing.commands.harness import harness_samples

        logged = harness_samples(
            planned.harness, planned.strategies, loaded, calibration, arguments
        )
    gains: dict[str, Gain] = {}
    if arguments.turns:
        texts = [item.text for data in planned.sets for item in data.items]
        gains = measure_gains(
            loaded,
            own,
            texts or _texts_of(logged),
            calibration,
            turns=arguments.turns,
            token_budget=arguments.token_budget,
            window=arguments.window,
        )
    certificates = calibration.certificates if calibration is not None else {}
    said = [*same, *map(str, certificates.values())]
    return _receipt(planned, loaded, scored, logged, gains, said, arguments)


def plan(arguments: argparse.Namespace, model: Mapping[str, Any]) -> Plan:
    """Read and check everything that does not need the model.

    Raises:
        InputError: an unknown strategy, a missing file, no calibration where one is needed.
    """
    parsed = {
        one.id: one for one in map(parse_strategy, [arguments.baseline, *arguments.strategies])
    }
    for strategy in parsed.values():
        _check_base(strategy, list(parsed), arguments.tasks)
    if len(parsed) < 2:
        raise InputError(
            f"--strategies has none but the baseline '{arguments.baseline}'; allowed: at least one"
        )
    needing = [one for one in parsed.values() if one.uses_calibration]
    given = arguments.text is not None, arguments.calibration is not None
    if needing and given == (False, False):
        raise InputError(
            f"strategy '{needing[0].id}' needs a calibration of the model; allowed: --text FILE or "
            "--calibration DIR"
        )
    if given == (True, True):
        raise InputError("--text and --calibration are both given; allowed: one of them")
    sources = task_sources(arguments.tasks)
    harness = [task for task in arguments.tasks if task.partition("=")[0] not in sources]
    first = next(iter([*sources, *harness]))
    arms = [name for name in parsed if name != arguments.baseline]
    study, sets = None, []
    settings = parse(
        StatisticsConfig,
        {"baseline": arguments.baseline, "primary": {"strategy": arms[0], "dataset": first}},
        ORIGIN,
    )
    if sources:
        values = study_values(
            STUDY, model, sources, list(parsed), text=local(str(arguments.text)),
            seed=arguments.seed,
        )  # fmt: skip
        values["evaluation"] = {
            "token_budget": arguments.token_budget,
            "window": arguments.window,
            "kl_items": arguments.kl_items,
        }
        study = parsed_study(values)
        settings = study.statistics
        sets = [read_set(study, name, arguments.limit) for name in study.datasets]
    saved = None
    if arguments.calibration is not None and needing:
        saved = Calibration.for_strategies(arguments.calibration, *needing)
    texts = _apart(read_texts(arguments.text), sets) if needing and arguments.text else []
    return Plan(parsed, study, sets, harness, saved, texts, settings)


def _check_base(strategy: Strategy, names: Sequence[str], tasks: Sequence[str]) -> None:
    """Check that a control at equal budget can be scored.

    Raises:
        InputError: its base is not compared, or a task is the harness's, which logs no counts.
    """
    if not isinstance(strategy, EqualBudget):
        return
    if strategy.base.id not in names:
        raise InputError(
            f"strategy '{strategy.id}' has as many experts as '{strategy.base.id}'; allowed: both "
            "in --strategies"
        )
    foreign = [task for task in tasks if task.partition("=")[0] not in DATASETS]
    if foreign:
        raise InputError(
            f"strategy '{strategy.id}': --tasks has '{foreign[0]}'; allowed with it: "
            f"{', '.join(DATASETS)}"
        )


def read_set(study: StudyConfig, name: str, limit: int | None) -> EvaluationSet:
    """Return a set, or as many of its items as a study with ``items: limit`` draws.

    Raises:
        InputError: see :func:`moe_routing.data.tasks.load_items`.
    """
    items = load_items(name, cached_file(name, study.datasets[name].source))
    size = None if limit is None else min(limit, len(items))
    chosen = seeded_subset(items, size, data_rng(study.seed, name))
    return EvaluationSet(name, chosen, fingerprint(chosen))


def score_set(
    planned: Plan, data: EvaluationSet, loaded: LoadedModel, calibration: Calibration | None
) -> Scored:
    """Score a set under every strategy, with the functions that a study's cells are made by."""
    config, found = planned.study, Scored()
    assert config is not None  # noqa: S101 (there are sets)
    subset = divergence_subset(data.items, data.name, config)
    divergence = BaselineDivergence(loaded, subset, data.task, config, calibration)
    # Controls at equal budget read what their base has used.
    ordered = sorted(planned.strategies.values(), key=lambda one: isinstance(one, EqualBudget))
    for strategy in ordered:
        if isinstance(strategy, EqualBudget):
            base = found.records[strategy.base.id].routing
            strategy = strategy.like(base.by_layer["count_histogram"])
        scored = score_items(
            loaded, strategy, data.items, data.name, config, calibration, divergence
        )
        found.items[strategy.id] = scored.items
        found.records[strategy.id] = cell_record(
            loaded, strategy, data, scored, config, calibration
        )
    return found


def _check_model(planned: Plan, loaded: LoadedModel) -> None:
    """Check the settings against the model.

    Raises:
        InputError: see :func:`moe_routing.config.limits.check_limits`.
    """
    if planned.study is None:
        return
    experts = min(router.num_experts for router in find_routers(loaded.model))
    limits = Limits(experts, loaded.rule, max_length(loaded.model.config, None))
    check_limits(planned.study, limits, ORIGIN)


def _distinct(planned: Plan, loaded: LoadedModel) -> tuple[Plan, list[str]]:
    """Return the plan without strategies that are another's routing, and sentences about these.

    Raises:
        InputError: only the baseline's routing is left.
    """
    first: dict[str, str] = {}
    kept, same = {}, []
    for name, strategy in planned.strategies.items():
        standing = first.setdefault(strategy.resolved(loaded.rule).id, name)
        if standing == name:
            kept[name] = strategy
        else:
            same.append(f"`{name}` is the routing of `{standing}` on this model.")
    if len(kept) < 2:
        raise InputError(f"--strategies: {same[0]} Allowed: at least one other routing")
    return replace(planned, strategies=kept, **_settings(planned, list(kept))), same


def _settings(planned: Plan, kept: Sequence[str]) -> dict[str, Any]:
    """Return config and tests without the strategies that are not kept."""
    settings, study = planned.settings, planned.study
    compared = [name for name in kept if study is None or name in study.strategies]
    primary = settings.primary.model_copy(update={"strategy": compared[:2][-1]})
    settings = settings.model_copy(update={"primary": primary})
    if study is not None:
        levers = [name for name in kept if name in study.levers]
        update = {"strategies": compared, "levers": levers, "statistics": settings}
        study = study.model_copy(update=update)
    return {"settings": settings, "study": study}


def _apart(texts: Sequence[str], sets: Sequence[EvaluationSet]) -> list[str]:
    """Return the documents that share no 13 words in a row with an item, and say how many do."""
    dropped = overlapping(texts, [item for data in sets for item in data.items])
    if dropped:
        print(
            f"{len(dropped)} of {len(texts)} documents of --text share {NGRAM} words in a row with "
            "an item of the tasks; they are left out",
            file=sys.stderr,
        )
    return [text for index, text in enumerate(texts) if index not in dropped]


def _texts_of(logged: Mapping[str, Mapping[str, Sequence[Sample]]]) -> list[str]:
    """Return what the harness asked: the first argument of each document's first request."""
    arms = [samples for arms in logged.values() for samples in arms.values()]
    return [str(sample["arguments"][0][0]) for samples in arms[:1] for sample in samples]


def _receipt(
    planned: Plan,
    loaded: LoadedModel,
    scored: Mapping[str, Scored],
    logged: Mapping[str, Mapping[str, Sequence[Sample]]],
    gains: Mapping[str, Gain],
    said: Sequence[str],
    arguments: argparse.Namespace,
) -> Receipt:
    panels = [_panel(planned, data, scored[data.name]) for data in planned.sets]
    for task, arms in logged.items():
        panels += sample_panels(task, arms)
    found = differences(panels, planned.settings, arguments.seed)
    sections, cells = [], []
    for data in planned.sets:
        rows = _score_rows(planned, data, scored[data.name])
        cells += rows
        sections.append(_score_section(data, rows))
        sections.append(difference_section(found, data.name, planned.settings))
    sections += [difference_section(found, task, planned.settings) for task in logged]
    if gains:
        sections.append(_gain_section(gains))
    rule, layers = loaded.rule, len(find_routers(loaded.model))
    provenance = loaded.provenance
    revision = f" at `{provenance['revision']}`" if provenance["revision"] else ""
    summary = (
        f"Model: `{provenance['path']}`{revision}, {layers} layers with a router, "
        f"{rule.top_k} experts per token, {provenance['dtype']} on {provenance['device']}; weights "
        f"sha256 `{provenance['weights_sha256'][:16]}`.",
        *said,
        explanation(planned.settings),
    )
    record = {
        "command": {
            name: value if isinstance(value, int | float | list | None) else str(value)
            for name, value in vars(arguments).items()
            if name != "run"
        },
        "provenance": provenance,
        "environment": environment(arguments.seed, torch.get_num_threads()),
        "settings": planned.settings.model_dump(mode="json"),
        "cells": [
            record.to_json() for cells in scored.values() for record in cells.records.values()
        ],
        "scores": cells,
        **found.record,
        "gains": {name: asdict(gain) for name, gain in gains.items()},
    }
    title = f"{', '.join(list(planned.strategies)[1:])} against {planned.settings.baseline}"
    return Receipt(title, summary, sections, record)


def _panel(planned: Plan, data: EvaluationSet, scored: Scored) -> Panel:
    cells = [ScoredCell(name, data.name, data.task, items) for name, items in scored.items.items()]
    assert planned.study is not None  # noqa: S101 (there are sets)
    return make_panel(cells, planned.study.main_metrics[data.name])


def _score_rows(planned: Plan, data: EvaluationSet, scored: Scored) -> list[dict[str, Any]]:
    """Return every metric of every strategy on a set, with its interval."""
    assert planned.study is not None  # noqa: S101 (there are sets)
    return [
        {
            "strategy": name,
            "dataset": data.name,
            "mean_experts": scored.records[name].routing.mean_experts,
            **asdict(estimate),
        }
        for name, items in scored.items.items()
        for estimate in estimates_of(items, data.task, planned.study)
    ]


def _score_section(data: EvaluationSet, rows: Sequence[Mapping[str, Any]]) -> Section:
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        strategy = row["strategy"]
        line = table.setdefault(
            strategy, {"strategy": strategy, "experts per token": f"{row['mean_experts']:.2f}"}
        )
        metric, is_kl = METRICS[row["metric"]], row["metric"] == DIVERGENCE.name
        percent = " (%)" if metric.is_proportion else ""
        digits = 4 if is_kl else 2
        value, low, high = (row[key] * metric.percent for key in ("value", "low", "high"))
        line[f"{metric.label}{percent}"] = (
            f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        )
    return Section(
        f"{data.name}: scores", f"{len(data.items):,} items.", pd.DataFrame(table.values())
    )


def _gain_section(gains: Mapping[str, Gain]) -> Section:
    first = next(iter(gains.values()))
    rows = []
    for name, gain in gains.items():
        row = {
            "strategy": name,
            "scoring, tokens/s": _against(
                gain.scoring_tokens_per_second, first.scoring_tokens_per_second
            ),
            "decoding, tokens/s": _against(
                gain.decode_tokens_per_second, first.decode_tokens_per_second
            ),
            "experts per decoded token": f"{gain.decode_experts:.2f}",
        }
        if gain.decode_expert_bytes is not None and first.decode_expert_bytes is not None:
            row["expert MB per decoded token"] = _against(
                gain.decode_expert_bytes / 1e6, first.decode_expert_bytes / 1e6
            )
        rows.append(row)
    note = (
        "Medians of interleaved turns, with the ratio to the baseline. Decoding is greedy, one "
        "text at a time; the bytes are those of the expert weights that a token selects."
    )
    return Section("What is gained", note, pd.DataFrame(rows))


def _against(value: float, baseline: float) -> str:
    digits = 1 if value < 100 else 0
    return f"{value:,.{digits}f} ({value / baseline:.2f}x)"
