"""Budgets: the value of a strategy's free parameter that keeps a given mean number of experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moe_routing.errors import InputError
from moe_routing.files import read_json, save_json

if TYPE_CHECKING:
    from moe_routing.routing.strategies import Strategy

FOLDER = "budgets"
FITTED, LEFT_OUT = "fitted", "left out"

Value = float | tuple[float, ...]
"""Value of a free parameter: one number, or one of each layer."""


@dataclass(frozen=True)
class Budget:
    """What fitting a strategy's free parameter to its budget found.

    Attributes:
        strategy: id of the strategy.
        parameter: the free parameter.
        value: its value; None if the point is left out.
        budget: mean experts per token and layer that the id asks for.
        realised: mean experts per token and layer on the calibration documents, measured by running
            the routed model with the value, or with the closest one that was tried.
        realised_by_layer: the same by layer.
        tokens: tokens of these documents.
        status: ``fitted``, or ``left out`` if no allowed value keeps the budget.
        reason: why it is left out; empty otherwise.
    """

    strategy: str
    parameter: str
    value: Value | None
    budget: float
    realised: float
    realised_by_layer: tuple[float, ...]
    tokens: int
    status: Literal["fitted", "left out"]
    reason: str = ""

    @property
    def left_out(self) -> bool:
        """Whether no allowed value keeps the budget."""
        return self.status == LEFT_OUT

    def __str__(self) -> str:
        if self.left_out:
            return f"{self.strategy}: left out, {self.reason}"
        value = self.value
        shown = f"{value:g}" if isinstance(value, float) else "one value per layer"
        return f"{self.strategy}: {self.parameter} {shown} keeps {self.realised:.2f} experts"

    def save(self, path: Path | str) -> None:
        """Write JSON."""
        save_json(asdict(self), path)

    @classmethod
    def load(cls, path: Path | str) -> Budget:
        """Read a file written by :meth:`save`.

        Raises:
            InputError: the file is missing or not a fitted budget.
        """
        values = read_json(Path(path))
        try:
            if isinstance(values["value"], list):
                values["value"] = tuple(values["value"])
            values["realised_by_layer"] = tuple(values["realised_by_layer"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: not a fitted budget: {error}") from error


def budget_path(folder: Path | str, strategy_id: str) -> Path:
    """Return the file of a strategy's fitted budget in a calibration folder."""
    return Path(folder) / FOLDER / f"{strategy_id}.json"


def load_budgets(folder: Path | str, strategy_ids: Iterable[str]) -> dict[str, Budget]:
    """Read the fitted budgets of strategies from a calibration folder, by id.

    Raises:
        InputError: a file is missing or damaged.
    """
    return {name: Budget.load(budget_path(folder, name)) for name in strategy_ids}


def left_out(folder: Path, strategies: Iterable[Strategy]) -> dict[str, str]:
    """Return the strategies that are left out, by id, and why: their budget cannot be kept.

    A control is left out with its base. A budget that has not been fitted yet leaves none out.

    Args:
        folder: the calibration folder of a study.
        strategies: the strategies.
    """
    found = {}
    for strategy in strategies:
        name = getattr(strategy, "base", strategy).needs_budget
        path = budget_path(folder, name) if name else None
        if path is not None and path.is_file() and (budget := Budget.load(path)).left_out:
            found[strategy.id] = f"left out: {budget.reason}"
    return found
