"""The audit by intervention: what an expert that a rule calls needed does for the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from moe_routing.analysis.arms import check_arms
from moe_routing.analysis.capture import item_text
from moe_routing.analysis.discoveries import false_discoveries, weight_and_importance
from moe_routing.analysis.intervention import SelectionRecorder, loss_changes
from moe_routing.analysis.tables import write_csv
from moe_routing.analysis.text import read_text
from moe_routing.errors import InputError
from moe_routing.evaluation.requests import Encoder, max_length
from moe_routing.files import atomic_path
from moe_routing.models.adapters import find_routers
from moe_routing.models.loading import LoadedModel, load_model
from moe_routing.models.patch import routed
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import Strategy
from moe_routing.routing.strategies.testing import BH
from moe_routing.routing.strategies.topk import Regular

if TYPE_CHECKING:
    from moe_routing.config import StudyConfig

TOKENS_A_DOCUMENT = 4
"""More where there are too few documents."""
FIRST_POSITION = 8
"""Tokens with less context than this are not intervened on."""


@dataclass(frozen=True)
class Probe:
    """A document and the tokens in it to intervene on."""

    document: str
    ids_S: torch.Tensor
    positions: list[int]


def write_audit(config: StudyConfig, results: Path) -> pd.DataFrame:
    """Intervene under every arm, write ``audit/``, and return the table of proportions.

    Files: ``removals.parquet`` (one row an intervention), ``audit.csv`` and
    ``weight_importance.csv``.

    Raises:
        InputError: no perplexity set, text too short for the tokens asked for, a null that was not
            fitted or on too few tokens for a level, or a loss that is not finite.
    """
    settings = config.analysis.audit
    nulls = settings.nulls or config.calibration.nulls
    calibration = Calibration.load(results / "calibration", tuple(nulls))
    loaded = load_model(config.model, config.resources.threads)
    probes = choose_probes(config, results, loaded)
    routers = find_routers(loaded.model)
    layers = spaced_layers(len(routers), settings.layers)
    arms = audit_arms(config, nulls, routers[0].num_experts, routers[0].native_k)
    check_arms(loaded, arms, calibration)
    tables = [run_audit(loaded, arm, calibration, probes, layers, config) for arm in arms]
    removals = pd.concat(tables, ignore_index=True)
    folder = results / "audit"
    with atomic_path(folder / "removals.parquet") as temporary:
        removals.to_parquet(temporary, index=False)
    confidence = config.statistics.confidence
    table = false_discoveries(removals, settings.epsilon, confidence=confidence)
    write_csv(table, folder / "audit.csv")
    importance = weight_and_importance(
        removals,
        confidence=confidence,
        resamples=config.statistics.resamples,
        rng=np.random.default_rng(config.seed),
    )
    write_csv(importance, folder / "weight_importance.csv")
    return table


def audit_arms(
    config: StudyConfig, nulls: Sequence[str], experts: int, native_k: int
) -> list[Strategy]:
    """Return the stock routing, and BH without a cap at every null and level.

    A cap would leave out discoveries, so that what is audited would not be BH any more.
    """
    arms = [
        BH(max_k=experts, alpha=alpha, null=null)
        for null in nulls
        for alpha in config.analysis.audit.alpha
    ]
    return [Regular(k=native_k), *arms]


def spaced_layers(layers: int, wanted: int) -> list[int]:
    """Return layer indices, evenly spaced, first and last included.

    >>> spaced_layers(16, 4), spaced_layers(2, 5)
    ([0, 5, 10, 15], [0, 1])
    """
    return sorted({round(place) for place in np.linspace(0, layers - 1, min(wanted, layers))})


def choose_probes(config: StudyConfig, results: Path, loaded: LoadedModel) -> list[Probe]:
    """Draw documents, and tokens in them, by the seed of the study.

    Raises:
        InputError: the text has fewer tokens than asked for.
    """
    settings = config.analysis.audit
    window = min(settings.context, max_length(loaded.model.config, config.evaluation.window))
    encoder = Encoder(loaded.tokenizer, window)
    rng = np.random.default_rng(config.seed)
    items = read_text(config, results)
    probes, left = [], settings.tokens
    each = max(TOKENS_A_DOCUMENT, -(-settings.tokens // len(items)))
    for place in rng.permutation(len(items)):
        if left <= 0:
            break
        request = encoder.rolling([item_text(items[place])])[0][0]
        ids = [*request.input_ids, request.target_ids[-1]]
        positions = _positions(len(ids), min(left, each), settings.horizon, rng)
        if positions:
            probes.append(Probe(items[place].id, torch.tensor(ids), positions))
            left -= len(positions)
    if left > 0:
        raise InputError(
            f"analysis.audit.tokens is {settings.tokens}; allowed: at most "
            f"{settings.tokens - left}, which is what the text has at this context and horizon"
        )
    return probes


def _positions(length: int, wanted: int, horizon: int, rng: np.random.Generator) -> list[int]:
    allowed = np.arange(FIRST_POSITION, length - horizon)
    return sorted(rng.choice(allowed, min(wanted, allowed.size), replace=False).tolist())


def run_audit(
    loaded: LoadedModel,
    strategy: Strategy,
    calibration: Calibration,
    probes: Sequence[Probe],
    layers: Sequence[int],
    config: StudyConfig,
) -> pd.DataFrame:
    """Return one row a removal under one strategy."""
    recorder = SelectionRecorder()
    with routed(
        loaded.model,
        strategy,
        calibration=calibration,
        recorder=recorder,
        experts_implementation=config.model.experts_implementation,
    ):
        rows = [
            row
            for probe in tqdm(probes, desc=strategy.id, unit="document")
            for row in _probe_rows(loaded, probe, layers, config.analysis.audit.horizon, recorder)
        ]
    null, alpha = getattr(strategy, "null", "none"), getattr(strategy, "alpha", np.nan)
    return pd.DataFrame(rows).assign(arm=strategy.id, null=null, alpha=alpha)


def _probe_rows(
    loaded: LoadedModel,
    probe: Probe,
    layers: Sequence[int],
    horizon: int,
    recorder: SelectionRecorder,
) -> Iterator[dict[str, object]]:
    ids_S = probe.ids_S.to(loaded.model.device)
    model = loaded.model
    for found in loss_changes(model, ids_S, probe.positions, layers, horizon, recorder):
        for removal, hit, change_S in zip(
            found.removals, found.hit_R.tolist(), found.change_RS, strict=True
        ):
            yield {
                "document": probe.document,
                "position": found.position,
                **asdict(removal),
                "hit": hit,
                "change": change_S[0],
                "change_window": change_S.sum(),
                "followed": change_S.size,
                "noise": found.noise,
            }
