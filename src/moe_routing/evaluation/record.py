"""The record of a cell: what ``cells/<strategy>/<dataset>.json`` holds."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moe_routing.errors import InputError
from moe_routing.files import read_json, save_json, sha256_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from moe_routing.engine.recorder import RoutingStatistics
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.rule import ModelRule
    from moe_routing.routing.strategies import Strategy

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pandas", "safetensors")
STAGES = ("data", "routing", "engine", "evaluation")
"""Parts of the package that make a cell."""

Part = TypeVar("Part", bound="DataclassInstance")


@dataclass(frozen=True)
class RoutingSummary:
    """How the strategy routed: means over layers of what a recorder saw, and the layers.

    See :class:`moe_routing.engine.recorder.RoutingStatistics`.
    """

    tokens: int
    mean_experts: float
    sd_experts: float
    floor_proportion: float
    cap_proportion: float
    empty_proportion: float
    router_entropy: float
    max_weight: float
    by_layer: dict[str, list]

    @classmethod
    def of(cls, statistics: RoutingStatistics) -> RoutingSummary:
        """Summarise what a recorder saw."""
        return cls(
            tokens=statistics.tokens,
            mean_experts=statistics.mean_experts(),
            sd_experts=statistics.sd_experts(),
            floor_proportion=float(statistics.floor_binds_L.mean()),
            cap_proportion=float(statistics.cap_binds_L.mean()),
            empty_proportion=float(statistics.empty_L.mean()),
            router_entropy=float(statistics.entropy_L.mean()),
            max_weight=float(statistics.max_probability_L.mean()),
            by_layer=statistics.by_layer(),
        )


@dataclass(frozen=True)
class Timings:
    """Wall-clock times of a cell.

    Attributes:
        wall_seconds: scoring.
        tokens_per_second: scoring speed.
    """

    wall_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Provenance:
    """What a cell was made with: the model, the settings, the items (hash) and the software.

    ``revision`` is empty for a local model, ``commit`` is ``unknown`` outside a checkout. ``code``
    is a hash of the package's stages up to the cell, and ``threads`` the number of CPU threads.
    """

    path: str
    revision: str
    dtype: str
    device: str
    experts_implementation: str
    router_fingerprint: str
    weights_sha256: str
    token_budget: int
    data_sha256: str
    seed: int
    python: str
    packages: dict[str, str]
    commit: str
    code: str
    threads: int


@dataclass(frozen=True)
class CellRecord:
    """The record of a cell.

    Attributes:
        schema_version: version of this format.
        study: name of the study.
        strategy: id, family, parameters and weighting; see :func:`specification`.
        dataset: evaluation set.
        task: how its items were scored.
        n_items: number of items.
        routing: how the strategy routed.
        timings: how long it took.
        provenance: what it was made with.
        numerics: the numerics arm and what it changes; None for a cell of the study.
    """

    schema_version: int
    study: str
    strategy: dict[str, Any]
    dataset: str
    task: str
    n_items: int
    routing: RoutingSummary
    timings: Timings
    provenance: Provenance
    numerics: dict[str, str | int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without what does not apply."""
        values = asdict(self)
        if self.numerics is None:
            del values["numerics"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CellRecord:
        """Build the record from what :meth:`to_json` returned.

        Raises:
            KeyError: a key is missing.
        """
        parts = {
            "routing": _part(RoutingSummary, values["routing"]),
            "timings": _part(Timings, values["timings"]),
            "provenance": _part(Provenance, values["provenance"]),
        }
        return _part(cls, {**values, **parts})

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        save_json(self.to_json(), path, indent=1)

    @classmethod
    def read(cls, path: Path) -> CellRecord:
        """Read a record.

        Raises:
            InputError: the file is missing, damaged, not JSON, or lacks a key.
        """
        values = read_json(path)
        try:
            return cls.from_json(values)
        except (KeyError, TypeError) as error:
            reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{path}: {reason}; remove it and run the workflow again") from error


def _part(cls: type[Part], values: Mapping[str, Any]) -> Part:
    """Build a dataclass from the keys of its fields; KeyError names a missing one."""
    names = [
        field.name for field in fields(cls) if field.name in values or field.default is MISSING
    ]
    return cls(**{name: values[name] for name in names})


def specification(
    strategy: Strategy, rule: ModelRule, calibration: Calibration | None = None
) -> dict[str, Any]:
    """Return id, family, parameters and weighting of a strategy on a model with this rule.

    With a calibration, a parameter that a budget stands for has its fitted value, and ``fitted``
    names it.
    """
    head = {"id": strategy.id, "family": strategy.family.name}
    resolved = (strategy.fitted(calibration) if calibration else strategy).resolved(rule)
    kind = resolved.weighting_kind
    weighting = rule.weighting if kind == "model" else kind
    values = {**head, **resolved.model_dump(), "weighting": weighting}
    if strategy.needs_budget is None or calibration is None:
        return values
    budget = calibration.budgets[strategy.needs_budget]
    values.get("base", values)["budget"] = budget.budget
    return {**values, "fitted": {budget.parameter: budget.value}}


def environment(seed: int, threads: int) -> dict[str, Any]:
    """Return the versions of Python, packages and code, the seed and the number of threads."""
    return {
        "seed": seed,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "code": code_hash(),
        "threads": threads,
    }


@cache
def commit() -> str:
    """Return the commit of the checkout this package runs from, or 'unknown' outside one.

    An environment may lie in a checkout of something else, which does not track this file.
    """
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    return _git("rev-parse", "HEAD") if tracked else "unknown"


def _git(*arguments: str) -> str:
    """Return what git says in this package's folder; empty if it fails or is not installed."""
    command, here = ["git", *arguments], Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


@cache
def code_hash() -> str:
    """Return a hash of the code that a cell is made with: data, routing, engine, evaluation."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for stage in STAGES for path in (package / stage).rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()[:16]
