"""The baseline against itself under one changed setting: how large a difference is no finding."""

from __future__ import annotations

from pathlib import Path

from moe_routing.config.study import NumericsArm, StudyConfig
from moe_routing.evaluation.cells import load_calibration, score_dataset, write_cell
from moe_routing.evaluation.study_model import load_study_model


def evaluate_numerics(config: StudyConfig, results: Path) -> None:
    """Score the baseline under every numerics arm and write ``numerics/<arm>/<dataset>.*``.

    Arms of the same dtype share one loading of the model, and no two models are held at once.

    Raises:
        InputError: see :func:`moe_routing.evaluation.cells.evaluate_strategies`.
    """
    dtypes = {arm.name: config.under(arm).model.dtype for arm in config.numerics}
    for dtype in dict.fromkeys(dtypes.values()):
        arms = [arm for arm in config.numerics if dtypes[arm.name] == dtype]
        _evaluate_arms(config, results, arms)


def _evaluate_arms(config: StudyConfig, results: Path, arms: list[NumericsArm]) -> None:
    strategy = config.parsed[config.statistics.baseline]
    calibration = load_calibration(results, strategy)
    loaded = load_study_model(config.under(arms[0]).model, results, config.resources.threads)
    for arm in arms:
        for name in config.datasets:
            frame, record = score_dataset(
                loaded, strategy, name, config.under(arm), results, calibration
            )
            record["numerics"] = {"arm": arm.name, **arm.changes}
            write_cell(results / "numerics" / arm.name / name, frame, record)
