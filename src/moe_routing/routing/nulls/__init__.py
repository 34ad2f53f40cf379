"""Null hypotheses for router logits, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from moe_routing.errors import InputError
from moe_routing.files import reading
from moe_routing.routing.nulls.base import Null
from moe_routing.routing.nulls.diagnostics import diagnose
from moe_routing.routing.nulls.marginal import (
    PerExpert,
    PerExpertKDE,
    PermutedContext,
    Pooled,
    PooledKDE,
    Unselected,
)
from moe_routing.routing.nulls.needed import Needed
from moe_routing.routing.nulls.random_direction import RandomDirection
from moe_routing.routing.nulls.within_token import (
    WithinToken,
    WithinTokenEfron,
    WithinTokenSplit,
)
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.sample import CalibrationSample, sample_inputs
from moe_routing.routing.tensors import read_tensors, write_tensors
from moe_routing.routing.toggles import Toggles
from moe_routing.vocabulary import NULL_IDS, NeededId

NULLS: Mapping[str, type[Null]] = MappingProxyType(
    {
        null.id: null
        for null in (
            WithinToken,
            WithinTokenSplit,
            WithinTokenEfron,
            Pooled,
            PooledKDE,
            PerExpert,
            PerExpertKDE,
            Unselected,
            RandomDirection,
            PermutedContext,
        )
    }
)

"""The nulls that are fitted on router logits alone, by id."""

__all__ = ["NULLS", "Null", "diagnose", "fit_null", "load_null", "sample_inputs", "save_null"]


def fit_null(
    null_id: str,
    sample: CalibrationSample,
    toggles: Toggles | None = None,
    epsilon: float | None = None,
    outputs: ExpertOutputs | None = None,
) -> Null:
    """Fit a null by its id.

    Args:
        null_id: the id.
        sample: calibration sample.
        toggles: toggled experts of the same model, for ids of ``needed``.
        epsilon: what an id of ``needed`` without an epsilon stands for, in nats; None:
            :func:`moe_routing.routing.nulls.needed.default_epsilon`.
        outputs: outputs of the experts of the same model on calibration text, for the scores of
            ids of ``needed``. Without them an id without a score tests the probability.

    Raises:
        InputError: there is no such null, or its calibration data are missing or unfit.
    """
    if name := NeededId.parse(null_id):
        return Needed.fit(sample, toggles, name, epsilon, outputs)
    if null_id not in NULLS:
        raise InputError(f"null '{null_id}' is unknown; allowed: {', '.join(NULL_IDS)}")
    return NULLS[null_id].fit(sample)


def save_null(
    null: Null, sample: CalibrationSample, path: Path | str, toggles: Toggles | None = None
) -> None:
    """Write a fitted null as safetensors, with the identity of the model that it was fitted for.

    ``needed`` depends on all weights of the model, whose hash is that of its ``toggles``.
    """
    metadata = {"null": null.id, **_identity(null, sample, toggles)}
    write_tensors(path, null.tensors(), metadata)


def load_null(path: Path | str, sample: CalibrationSample, toggles: Toggles | None = None) -> Null:
    """Read a fitted null of the model that ``sample`` and ``toggles``, if given, were taken from.

    Raises:
        InputError: the file is missing, not a fitted null, or fitted for another model, number of
            layers or number of experts.
    """
    with reading(path, "a fitted null"):
        tensors, metadata = read_tensors(path)
        null_id = metadata["null"]
        fitted = Needed if NeededId.parse(null_id) else NULLS[null_id]
        null = fitted.from_tensors(tensors)
    for key, expected in _identity(null, sample, toggles).items():
        if metadata.get(key) != expected:
            raise InputError(
                f"{path}: null '{null.id}' was fitted with {key} = {metadata.get(key)}; "
                f"allowed: this model's {expected}"
            )
    return null


def _identity(null: Null, sample: CalibrationSample, toggles: Toggles | None) -> dict[str, str]:
    identity = {
        "layers": str(sample.num_layers),
        "experts": str(sample.num_experts),
        "fingerprint": sample.fingerprint,
    }
    if toggles is not None and isinstance(null, Needed):
        identity["weights"] = toggles.fingerprint
    return identity
