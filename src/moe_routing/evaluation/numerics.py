"""Score the baseline with one setting changed: how large a difference is numerical noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_routing.config.study import NumericsArm, StudyConfig
from moe_routing.evaluation.cells import (
    EvaluationSet,
    cell_record,
    load_calibration,
    score_items,
    write_cell,
)
from moe_routing.evaluation.study_model import load_study_model


def evaluate_numerics(config: StudyConfig, results: Path) -> None:
    """Score the baseline under every numerics arm and write ``numerics/<arm>/<dataset>.*``.

    Arms of the same dtype share one loading of the model, and no two models are held at once.

    Raises:
        InputError: see :func:`moe_routing.evaluation.cells.evaluate_strategies`.
    """
    if not config.numerics:
        return
    datasets = [EvaluationSet.read(results, name) for name in config.datasets]
    dtypes = {arm.name: config.under(arm).model.dtype for arm in config.numerics}
    for dtype in dict.fromkeys(dtypes.values()):
        arms = [arm for arm in config.numerics if dtypes[arm.name] == dtype]
        _evaluate_arms(config, results, arms, datasets)


def _evaluate_arms(
    config: StudyConfig,
    results: Path,
    arms: Sequence[NumericsArm],
    datasets: Sequence[EvaluationSet],
) -> None:
    strategy = config.parsed[config.statistics.baseline]
    calibration = load_calibration(results, strategy)
    loaded = load_study_model(config.under(arms[0]).model, results, config.resources.threads)
    for arm in arms:
        changed = config.under(arm)
        for dataset in datasets:
            scored = score_items(
                loaded, strategy, dataset.items, dataset.name, changed, calibration
            )
            numerics = {"arm": arm.name, **arm.changes}
            record = cell_record(loaded, strategy, dataset, scored, changed, numerics=numerics)
            write_cell(results / "numerics" / arm.name / dataset.name, scored.items, record)
