"""Fits the nulls of a study, as many as possible with one start of Python."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from moe_routing.config.cells import SAMPLE, intervention_files
from moe_routing.config.study import load_config
from moe_routing.errors import InputError
from moe_routing.evaluation.pieces import null_piece
from moe_routing.evaluation.store import Piece, Store, eligible, with_suffix
from moe_routing.files import atomic_path
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import diagnose, fit_null, save_null
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.toggles import Toggles


def fit_study_null(results: Path, null_id: str) -> None:
    """Write a fitted null and its diagnostics, and fit other nulls of the study in passing.

    Args:
        results: folder of the study.
        null_id: one of its nulls.

    Raises:
        InputError: the study has no such null, a file is missing, or see :func:`fit_null`.
    """
    config = load_config(results / "config.yaml")
    nulls = config.calibration.nulls
    if null_id not in nulls:
        raise InputError(f"null '{null_id}' is not fitted; allowed: {', '.join(nulls)}")
    names = {null_piece(config, name): name for name in (null_id, *nulls)}
    own, *_ = names
    store = Store(results)
    others = [piece for piece in eligible(own, names, lambda _: False) if not store.has(piece)]

    @cache
    def shared() -> Calibration:
        sample = CalibrationSample.load(results / SAMPLE)
        files = intervention_files([null_id])
        if not files:
            return Calibration(sample)
        toggles, outputs = (results / file for file in files)
        return Calibration(
            sample, toggles=Toggles.load(toggles), outputs=ExpertOutputs.load(outputs)
        )

    def make(piece: Piece, path: Path) -> None:
        read, epsilon = shared(), config.calibration.epsilon
        null = fit_null(names[piece], read.sample, read.toggles, epsilon, read.outputs)
        with atomic_path(with_suffix(path, ".csv")) as temporary:
            diagnose(null, read).to_csv(temporary, index=False)
        save_null(null, read.sample, with_suffix(path, ".safetensors"), read.toggles)

    store.finish(own, others, make, len(names))
    store.deliver(own)
