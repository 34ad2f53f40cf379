"""Calibration data of a model: sampled logits and the nulls fitted to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_routing.errors import InputError
from moe_routing.files import read_json, save_json
from moe_routing.routing.budget import FOLDER as BUDGETS_FOLDER
from moe_routing.routing.budget import Budget, budget_path, load_budgets
from moe_routing.routing.certificate import Certificate
from moe_routing.routing.nulls import Null, load_null, save_null
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.toggles import Toggles
from moe_routing.vocabulary import NeededId

if TYPE_CHECKING:
    from moe_routing.routing.strategies import Strategy

SAMPLE_FILE = "router_logits.safetensors"
OUTPUTS_FILE = "expert_outputs.safetensors"
SCALES_FOLDER = "scales"
TOGGLES_FILE = "toggles.safetensors"


def certificate_path(folder: Path | str, strategy_id: str) -> Path:
    """Return the file of a strategy's certificate."""
    return Path(folder) / "certificates" / f"{strategy_id}.json"


def scale_path(folder: Path | str, strategy_id: str) -> Path:
    """Return the file of a strategy's fitted scale."""
    return Path(folder) / SCALES_FOLDER / f"{strategy_id}.json"


def save_scale(strategy_id: str, scale: float | None, path: Path) -> None:
    """Write the fitted scale of a strategy; None if the strategy is left out."""
    save_json({"strategy": strategy_id, "scale": scale}, path)


def load_scale(path: Path) -> float | None:
    """Read the fitted scale of a strategy; None if the strategy is left out.

    Raises:
        InputError: the file is missing or damaged.
    """
    values = read_json(path)
    if not isinstance(values.get("scale", ""), float | None):
        raise InputError(f"{path}: key 'scale' is missing; remove the file and run again")
    return values["scale"]


def budgets_of(strategies: Iterable[Strategy]) -> list[str]:
    """Return the distinct ids under which budgets of strategies are fitted."""
    return list(dict.fromkeys(one.needs_budget for one in strategies if one.needs_budget))


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
        budgets: fitted values of free parameters, by :attr:`Strategy.needs_budget`.
    """

    sample: CalibrationSample
    nulls: dict[str, Null] = field(default_factory=dict)
    toggles: Toggles | None = None
    outputs: ExpertOutputs | None = None
    scales: dict[str, float] = field(default_factory=dict)
    certificates: dict[str, Certificate] = field(default_factory=dict)
    budgets: dict[str, Budget] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        null_ids: Sequence[str] | None = None,
        *,
        outputs: bool = False,
        toggles: bool = False,
    ) -> Calibration:
        """Read a calibration that was saved, or that of a study: all of it, or some nulls.

        With the ids of nulls, the toggles and the expert outputs, which are bound to all weights of
        their model, are read for nulls ``needed`` only, and nothing that is fitted by running.

        Args:
            folder: the folder.
            null_ids: ids of the nulls to read; None: everything in the folder.
            outputs: whether to read the expert outputs in any case.
            toggles: whether to read the toggles in any case.

        Raises:
            InputError: a file is missing, damaged, or of another model.
        """
        folder = Path(folder)
        if null_ids is None:
            return cls._load_all(folder)
        sample = CalibrationSample.load(folder / SAMPLE_FILE)
        needed = any(NeededId.parse(name) for name in null_ids)
        toggled = Toggles.load(folder / TOGGLES_FILE) if toggles or needed else None
        measured = ExpertOutputs.load(folder / OUTPUTS_FILE) if outputs or needed else None
        nulls = {name: load_null(null_path(folder, name), sample, toggled) for name in null_ids}
        return cls(sample, nulls, toggled, measured)

    @classmethod
    def _load_all(cls, folder: Path) -> Calibration:
        nulls = [path.stem for path in sorted((folder / "nulls").glob("*.safetensors"))]
        present = {name: (folder / name).is_file() for name in (OUTPUTS_FILE, TOGGLES_FILE)}
        found = cls.load(
            folder, nulls, outputs=present[OUTPUTS_FILE], toggles=present[TOGGLES_FILE]
        )
        paths = sorted((folder / "certificates").glob("*.json"))
        certificates = [Certificate.load(path) for path in paths]
        scales = {
            path.name.removesuffix(".json"): load_scale(path)
            for path in sorted((folder / SCALES_FOLDER).glob("*.json"))
        }
        budgets = [Budget.load(path) for path in sorted((folder / BUDGETS_FOLDER).glob("*.json"))]
        return replace(
            found,
            certificates={one.strategy: one for one in certificates},
            scales={name: scale for name, scale in scales.items() if scale is not None},
            budgets={one.strategy: one for one in budgets},
        )

    def save(self, folder: Path | str) -> None:
        """Write everything into a folder that :meth:`load` and :func:`moe_routing.routed` read.

        Raises:
            InputError: the disk is full or the folder cannot be written.
        """
        folder = Path(folder)
        self.sample.save(folder / SAMPLE_FILE)
        if self.outputs is not None:
            self.outputs.save(folder / OUTPUTS_FILE)
        if self.toggles is not None:
            self.toggles.save(folder / TOGGLES_FILE)
        for name, null in self.nulls.items():
            save_null(null, self.sample, null_path(folder, name), self.toggles)
        for name, certificate in self.certificates.items():
            certificate.save(certificate_path(folder, name))
        for name, scale in self.scales.items():
            save_scale(name, scale, scale_path(folder, name))
        for name, budget in self.budgets.items():
            budget.save(budget_path(folder, name))

    def __str__(self) -> str:
        sample = self.sample
        lines = [
            f"calibration of {sample.num_layers} layers with {sample.num_experts} experts, top "
            f"{sample.top_k}, on {sample.num_tokens:,} tokens"
        ]
        if self.nulls:
            lines.append(f"nulls: {', '.join(self.nulls)}")
        fitted = [*self.certificates.values(), *self.budgets.values()]
        return "\n".join([*lines, *map(str, fitted)])

    @classmethod
    def for_strategies(
        cls, folder: Path | str, *strategies: Strategy, fitted_by_running: bool = True
    ) -> Calibration:
        """Read what strategies need.

        Args:
            folder: the calibration folder of a study.
            strategies: the strategies.
            fitted_by_running: with certificates, budgets and scales, which are fitted by running
                them.

        Raises:
            InputError: a file is missing, damaged, or of another model.
        """
        nulls = dict.fromkeys(one.needs_null for one in strategies if one.needs_null)
        found = cls.load(
            folder,
            list(nulls),
            outputs=any(one.needs_outputs for one in strategies),
            toggles=any(one.needs_toggles for one in strategies),
        )
        if not fitted_by_running:
            return found
        certified = [one.id for one in strategies if one.needs_certificate]
        certificates = {
            name: Certificate.load(certificate_path(folder, name)) for name in certified
        }
        scales = {
            one.id: scale
            for one in strategies
            if one.needs_scale and (scale := load_scale(scale_path(folder, one.id))) is not None
        }
        budgets = load_budgets(folder, budgets_of(strategies))
        return replace(found, certificates=certificates, scales=scales, budgets=budgets)

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
