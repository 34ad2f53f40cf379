"""Jobs that fit something about strategies on calibration text: budgets and scales of the output.

Every job fits its own strategy, and others of the study in passing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.evaluation.calibration_job import CalibrationJob, load_calibration_job
from moe_routing.evaluation.pieces import fitted_pieces
from moe_routing.evaluation.store import Piece, Store, currency, eligible
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import parse_strategy

if TYPE_CHECKING:
    from moe_routing.config.study import StudyConfig

DOCUMENTS = 24
"""Documents of a study's calibration text that are read."""


def fit_in_passing(
    config: StudyConfig,
    results: Path,
    own: Piece,
    names: Mapping[Piece, str],
    fit: Callable[[str, CalibrationJob, Calibration, Path], None],
) -> None:
    """Write what was fitted for a strategy, and fit others in passing.

    Args:
        config: the study.
        results: its folder.
        own: the piece that must be finished.
        names: the strategy of every piece of this kind.
        fit: fits a strategy and writes the result to a path without suffix. It gets the first
            :data:`DOCUMENTS` documents of the calibration text only, and what its strategies need
            that is not fitted by running them.
    """
    store = Store(results)
    current = currency(store, own.files, fitted_pieces(config))
    others = [piece for piece in eligible(own, names, current) if not store.has(piece)]

    @cache
    def shared() -> tuple[CalibrationJob, Calibration]:
        strategies = [parse_strategy(names[piece]) for piece in (own, *others)]
        calibration = Calibration.for_strategies(
            results / "calibration", *strategies, fitted_by_running=False
        )
        job = load_calibration_job(results)
        return job._replace(texts=job.texts[:DOCUMENTS]), calibration

    def make(piece: Piece, path: Path) -> None:
        fit(names[piece], *shared(), path)

    store.finish(own, others, make, config.resources.strategies_per_job)
    store.deliver(own)
