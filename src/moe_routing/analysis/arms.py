"""The strategies that an analysis runs."""

from __future__ import annotations

from collections.abc import Iterable

from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.routed import routed
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import Strategy


def check_arms(loaded: LoadedModel, arms: Iterable[Strategy], calibration: Calibration) -> None:
    """Build the router of every strategy once, so that a wrong one stops the run at its start.

    Raises:
        InputError: more experts than the model has, a calibration of another model, or too few
            calibration tokens for a level.
    """
    for strategy in arms:
        with routed(loaded.model, strategy, calibration=calibration):
            pass
