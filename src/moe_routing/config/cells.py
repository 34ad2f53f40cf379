"""The cells of a study, and what each depends on: no more, lest edits score needlessly; no less.

Paths are relative to the results folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import getitem
from typing import NamedTuple

from moe_routing.config.study import NumericsArm, StudyConfig
from moe_routing.errors import InputError
from moe_routing.routing.strategies import ControlStrategy
from moe_routing.vocabulary import NeededId

CELLS, NUMERICS = "cells", "numerics"
MODEL_FILE = "model.json"
CALIBRATION_TEXT = "data/calibration.parquet"
SAMPLE = "calibration/router_logits.safetensors"
TIMING_FILE = "efficiency/timing.csv"
UNIQUE_FILE = "efficiency/unique_experts.csv"
SCHEMA_VERSION = 2
"""Version of the record of a cell; cells of another one are made again."""


class Cell(NamedTuple):
    """One strategy on one evaluation set, or the baseline under a numerics arm on one.

    Attributes:
        part: ``cells``, or ``numerics``.
        name: the strategy's id, or the arm's name.
        dataset: evaluation set.
    """

    part: str
    name: str
    dataset: str

    @property
    def path(self) -> str:
        """Its path in the results folder, without suffix."""
        return "/".join(self)


def cells_of(study: StudyConfig) -> list[Cell]:
    """Return every cell of a study, by evaluation set."""
    return [
        Cell(part, name, dataset)
        for dataset in study.datasets
        for part, name in (
            *((CELLS, strategy) for strategy in study.scored_on(dataset)),
            *((NUMERICS, arm.name) for arm in study.numerics),
        )
    ]


def parse_cell(study: StudyConfig, path: str) -> Cell:
    """Return the cell with a path such as ``cells/stock/wikipedia``.

    Raises:
        InputError: the study has no such cell.
    """
    known = {cell.path: cell for cell in cells_of(study)}
    if path not in known:
        raise InputError(
            f"cell '{path}'; allowed: cells/<strategy>/<data set> or numerics/<arm>/<data set> of "
            "the study"
        )
    return known[path]


def arm_of(study: StudyConfig, cell: Cell) -> NumericsArm | None:
    """Return the numerics arm of a cell, None for a cell of the comparison."""
    if cell.part == CELLS:
        return None
    return next(arm for arm in study.numerics if arm.name == cell.name)


def study_of(study: StudyConfig, cell: Cell) -> StudyConfig:
    """Return the study under the settings of a cell."""
    arm = arm_of(study, cell)
    return study if arm is None else study.under(arm)


def strategy_of(study: StudyConfig, cell: Cell) -> str:
    """Return the id of the strategy that a cell scores."""
    return cell.name if cell.part == CELLS else study.statistics.baseline


def cell_settings(study: StudyConfig, cell: Cell) -> dict[str, object]:
    """Return the settings that determine a cell."""
    changed = study_of(study, cell)
    measured = ("evaluation",) if cell.part == CELLS else ()
    settings = sections(
        changed,
        "model",
        "evaluation.token_budget",
        "evaluation.window",
        *measured,
        "seed",
        "statistics.baseline",
    )
    arm = arm_of(study, cell)
    routed = {"strategy": strategy_of(study, cell), "arm": arm and arm.changes}
    return {"format": SCHEMA_VERSION, **settings, **routed}


def data_file(dataset: str) -> str:
    """Return the file of an evaluation set's items, relative to the results folder."""
    return f"data/{dataset}.parquet"


def cell_files(study: StudyConfig, cell: Cell) -> list[str]:
    """Return the files that determine a cell, those of the calibration only if it uses them."""
    used = [strategy_of(study, cell)]
    if cell.part == CELLS:  # its divergence from the baseline is measured
        used.append(study.statistics.baseline)
    base = base_cell(study, cell)
    cells = [] if base is None else [f"{base.path}.json"]
    return [MODEL_FILE, data_file(cell.dataset), *calibration_files(study, used), *cells]


def base_cell(study: StudyConfig, cell: Cell) -> Cell | None:
    """Return the cell whose numbers of experts a control takes over, if it does."""
    base = study.parsed[strategy_of(study, cell)].needs_cell
    return None if base is None else Cell(CELLS, base, cell.dataset)


def uses_calibration(study: StudyConfig, cell: Cell) -> bool:
    """Return whether a cell depends on calibration text."""
    base = base_cell(study, cell)
    own = SAMPLE in cell_files(study, cell)
    return own or (base is not None and uses_calibration(study, base))


def measured(study: StudyConfig) -> list[str]:
    """Return the ids of the strategies whose time is measured, the baseline first.

    Controls that take over another strategy's choices are no methods of their own, and a fitted
    scale takes no time.
    """
    parsed = study.parsed
    names = dict.fromkeys([study.statistics.baseline, *study.scored])
    return [
        name
        for name in names
        if not isinstance(parsed[name], ControlStrategy) and not parsed[name].needs_scale
    ]


def scale_settings(study: StudyConfig, strategy: str) -> dict[str, object]:
    """Return the settings that determine the fitted scale of a strategy."""
    chosen = sections(study, "model", "evaluation.window", "evaluation.token_budget")
    return {**chosen, "strategy": strategy}


def scale_files(study: StudyConfig, strategy: str) -> list[str]:
    """Return the files that determine the fitted scale of a strategy."""
    used = calibration_files(study, [strategy], fitted_by_running=False)
    name = study.parsed[strategy].needs_budget
    fitted = [] if name is None else [f"{budget_path(name)}.json"]
    return [MODEL_FILE, CALIBRATION_TEXT, *used, *fitted]


def scale_path(strategy: str) -> str:
    """Return the path of a strategy's fitted scale, without suffix."""
    return f"calibration/scales/{strategy}"


def budget_settings(study: StudyConfig, strategy: str) -> dict[str, object]:
    """Return the settings that determine the fitted budget of a strategy."""
    chosen = sections(study, "model", "evaluation.window", "evaluation.token_budget")
    return {**chosen, "strategy": strategy}


def budget_files(study: StudyConfig, strategy: str) -> list[str]:
    """Return the files that determine the fitted budget of a strategy."""
    used = next(name for name, parsed in study.parsed.items() if parsed.needs_budget == strategy)
    files = calibration_files(study, [used], fitted_by_running=False)
    return [MODEL_FILE, CALIBRATION_TEXT, *files]


def budget_path(strategy: str) -> str:
    """Return the path of a strategy's fitted budget, without suffix."""
    return f"calibration/budgets/{strategy}"


def sections(study: StudyConfig, *keys: str) -> dict[str, object]:
    """Return the parts of a config that a rule depends on, so that only changes to them rerun it.

    A key is a path, such as ``model``, ``datasets.<name>`` or ``analysis.bh.tokens``.
    """
    values = study.model_dump(mode="json")
    return {key: reduce(getitem, key.split("."), values) for key in keys}


def intervention_files(nulls: Iterable[str]) -> list[str]:
    """Return the files of toggled experts and of expert outputs if a null needs them."""
    if not any(NeededId.parse(null) for null in nulls):
        return []
    return [f"calibration/{name}.safetensors" for name in ("toggles", "expert_outputs")]


def null_files(nulls: Iterable[str]) -> list[str]:
    """Return the files of fitted nulls, and those of interventions if a null is bound to them."""
    names = list(nulls)
    files = [f"calibration/nulls/{null}.safetensors" for null in names]
    return [*files, *intervention_files(names)]


def null_settings(study: StudyConfig, null: str) -> dict[str, object]:
    """Return the settings that determine a fitted null: its epsilon, if the id leaves it open."""
    needed = NeededId.parse(null)
    open_epsilon = needed is not None and needed.epsilon is None
    return {"null": null, "epsilon": study.calibration.epsilon if open_epsilon else None}


def null_path(null: str) -> str:
    """Return the path of a fitted null, without suffix."""
    return f"calibration/nulls/{null}"


def calibration_files(
    study: StudyConfig, strategies: Sequence[str], *, fitted_by_running: bool = True
) -> list[str]:
    """Return the files of the calibration that strategies read; none if they do without.

    Args:
        study: the config.
        strategies: ids.
        fitted_by_running: with certificates, budgets and scales, which are fitted by running the
            strategies.
    """
    folder, parsed = "calibration", [study.parsed[name] for name in strategies]
    if not any(strategy.uses_calibration for strategy in parsed):
        return []
    files = [SAMPLE, *null_files(study.nulls_of(*strategies))]
    if any(strategy.needs_outputs for strategy in parsed):
        files.append(f"{folder}/expert_outputs.safetensors")
    if any(strategy.needs_toggles for strategy in parsed):
        files.append(f"{folder}/toggles.safetensors")
    if fitted_by_running:
        files += [
            f"{folder}/certificates/{strategy.id}.json"
            for strategy in parsed
            if strategy.needs_certificate
        ]
        files += [f"{budget_path(s.needs_budget)}.json" for s in parsed if s.needs_budget]
        files += [f"{scale_path(strategy.id)}.json" for strategy in parsed if strategy.needs_scale]
    return list(dict.fromkeys(files))
