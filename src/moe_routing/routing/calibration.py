"""Calibration data of a model: sampled logits and the nulls fitted to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_routing.errors import InputError
from moe_routing.routing.nulls import Null, load_null
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.toggles import Toggles
from moe_routing.vocabulary import NeededId

if TYPE_CHECKING:
    from moe_routing.routing.certificate import Certificate
    from moe_routing.routing.strategies.base import Strategy

SAMPLE_FILE = "router_logits.safetensors"
OUTPUTS_FILE = "expert_outputs.safetensors"
TOGGLES_FILE = "toggles.safetensors"


def null_path(folder: Path | str, null_id: str) -> Path:
    """Return the file of a fitted null."""
    return Path(folder) / "nulls" / f"{null_id}.safetensors"


@dataclass(frozen=True)
class Calibration:
    """Calibration data that strategies may use.

    Attributes:
        sample: router logits on calibration text.
        nulls: fitted nulls by id.
        toggles: toggled experts of calibration text, None if no null was fitted on them.
        outputs: outputs of experts on calibration text, None if nothing needs them.
        scales: the fitted factor of all weights, by id of the strategy.
        certificates: certified thresholds, by id of the strategy.
    """

    sample: CalibrationSample
    nulls: dict[str, Null] = field(default_factory=dict)
    toggles: Toggles | None = None
    outputs: ExpertOutputs | None = None
    scales: dict[str, float] = field(default_factory=dict)
    certificates: dict[str, Certificate] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        null_ids: tuple[str, ...] = (),
        *,
        outputs: bool = False,
        toggles: bool = False,
    ) -> Calibration:
        """Read the sample and the named nulls of a calibration folder.

        The toggles and the expert outputs, which are bound to all weights of their model, are read
        for nulls ``needed``.

        Args:
            folder: the calibration folder of a study.
            null_ids: ids of the nulls to read.
            outputs: whether to read the expert outputs in any case.
            toggles: whether to read the toggles in any case.

        Raises:
            InputError: a file is missing, damaged, or of another model.
        """
        folder = Path(folder)
        sample = CalibrationSample.load(folder / SAMPLE_FILE)
        needed = any(NeededId.parse(name) for name in null_ids)
        toggled = Toggles.load(folder / TOGGLES_FILE) if toggles or needed else None
        found = ExpertOutputs.load(folder / OUTPUTS_FILE) if outputs or needed else None
        nulls = {name: load_null(null_path(folder, name), sample, toggled) for name in null_ids}
        return cls(sample, nulls, toggled, found)

    @classmethod
    def load_for(cls, folder: Path | str, *strategies: Strategy) -> Calibration:
        """Read what strategies need of a calibration folder.

        Raises:
            InputError: a file is missing, damaged, or of another model.
        """
        nulls = dict.fromkeys(strategy.needs_null for strategy in strategies)
        return cls.load(
            folder,
            tuple(null for null in nulls if null),
            outputs=any(strategy.needs_outputs for strategy in strategies),
            toggles=any(strategy.needs_toggles for strategy in strategies),
        )

    def null(self, null_id: str) -> Null:
        """Return a fitted null.

        Raises:
            InputError: it was not fitted.
        """
        if null_id not in self.nulls:
            known = ", ".join(self.nulls) or "none"
            raise InputError(f"null '{null_id}' is not fitted; fitted: {known}")
        return self.nulls[null_id]

    def confidence_quantiles(self, levels: Tensor) -> Tensor:
        """Return quantiles over tokens of the largest softmax probability, (layers, levels)."""
        largest_LT = self.sample.logits_LTE.softmax(-1).amax(-1)
        return torch.quantile(largest_LT, levels.to(largest_LT), dim=1).T
