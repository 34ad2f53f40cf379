"""What a model allows a study to ask of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_routing.config.study import StudyConfig
from moe_routing.errors import InputError
from moe_routing.routing.strategies import parse_strategy


@dataclass(frozen=True)
class Limits:
    """The numbers of a model that settings must not exceed.

    Attributes:
        experts: experts of a layer.
        top_k: experts per token that it was trained with.
        window: most input tokens of a forward pass.
    """

    experts: int
    top_k: int
    window: int

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Limits:
        """Take them from a description of the model; see ``model.json``."""
        return cls(described["num_experts"], described["top_k"], described["window"])


def check_limits(study: StudyConfig, limits: Limits, origin: str) -> None:
    """Check every setting that a model may be too small for, before anything is run.

    Args:
        study: the config.
        limits: the model's.
        origin: how errors name the config file.

    Raises:
        InputError: more experts than the model has, a window longer than it reads, or a null that
            is made of experts it rejects where it rejects none.
    """
    study = study.of_model(limits.experts, limits.top_k)
    window = study.evaluation.window
    if window is not None and window > limits.window:
        raise InputError(
            f"{origin}: evaluation.window is {window}; allowed: at most the model's {limits.window}"
        )
    for key, nulls in (
        ("calibration.nulls", study.calibration.nulls),
        ("analysis.validity.nulls", study.analysis.validity.nulls),
    ):
        if "unselected" in (nulls or ()) and limits.top_k == limits.experts:
            raise InputError(
                f"{origin}: {key} has 'unselected'; allowed: nulls that need no rejected experts, "
                f"since the model selects all its {limits.experts}"
            )
    for setting, value in _numbers_of_experts(study):
        if value > limits.experts:
            raise InputError(
                f"{origin}: {setting}; allowed: at most the model's {limits.experts} experts"
            )


def _numbers_of_experts(study: StudyConfig) -> Iterator[tuple[str, int]]:
    """Yield what a setting says, and how many experts it needs."""
    for key in ("strategies", "controls"):
        for name in getattr(study, key):
            most = parse_strategy(name).max_experts
            yield f"{key} has '{name}', which may select {most}", most
    lists = {
        "bh.max_k": study.analysis.bh.max_k,
        "bh.fewer_k": study.analysis.bh.fewer_k,
        "validity.signals": study.analysis.validity.signals,
    }
    for key, values in lists.items():
        yield from ((f"analysis.{key} has {value}", value) for value in values or ())
    cap = study.analysis.validity.max_k
    if cap is not None:
        yield f"analysis.validity.max_k is {cap}", cap
