"""Expert ablation: how the loss changes when the experts that a null calls needed are removed.

One set of interventions serves every null and level. In the stock model each expert that the stock
router selected is removed, one at a time: its weight is set to 0, the others are not renormalised,
and later layers route as usual (:mod:`moe_routing.engine.toggling`). BH on the same router logits
then says which of these removals are discoveries under which null and level. So all nulls are
compared on the same model, tokens and removals; no model is routed by BH, which would change its
hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from moe_routing.analysis.arms import ablation_arms, check_arms
from moe_routing.analysis.capture import watch_ids
from moe_routing.analysis.discoveries import (
    false_discoveries,
    labelled,
    weight_and_importance,
)
from moe_routing.analysis.tables import write_csv
from moe_routing.analysis.text import item_text, read_text
from moe_routing.engine.adapters import find_routers, watched
from moe_routing.engine.branches import Probe, batches
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.offload import weight_of
from moe_routing.engine.requests import Encoder, max_length
from moe_routing.engine.routed import routed
from moe_routing.engine.toggling import Effects, toggling
from moe_routing.errors import InputError
from moe_routing.evaluation.study_model import load_study_model
from moe_routing.files import atomic_path
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.scores import ExpertScorer
from moe_routing.routing.strategies.testing import BH
from moe_routing.routing.strategies.topk import Stock
from moe_routing.routing.types import RouterInputs, centred_norms

if TYPE_CHECKING:
    from moe_routing.config.study import StudyConfig

TOKENS_PER_DOCUMENT = 4
"""More if there are too few documents."""
FIRST_POSITION = 8
"""Tokens with less context than this are left alone."""


def write_ablation(config: StudyConfig, results: Path) -> pd.DataFrame:
    """Intervene in the stock model, write ``ablation/``, and return the table of proportions.

    Files: ``removals.parquet`` (one row per intervention), ``discoveries.parquet`` (one row
    per expert that BH discovers, by null and level), ``ablation.csv``, ``weight_importance.csv``.

    Raises:
        InputError: no perplexity set, text too short for the tokens asked for, a null that was not
            fitted or on too few tokens for a level, or a loss or router logit that is not finite.
    """
    settings = config.analysis.ablation
    nulls = settings.nulls or config.calibration.nulls
    calibration = Calibration.load(results / "calibration", tuple(nulls))
    loaded = load_study_model(config.model, results, config.resources.threads)
    probes = choose_probes(config, results, loaded)
    routers = find_routers(loaded.model)
    layers = spaced_layers(len(routers), settings.layers)
    stock = Stock()
    arms = ablation_arms(config, nulls, routers[0].num_experts)
    check_arms(loaded, [stock, *arms], calibration)
    implementation = config.model.experts_implementation
    with routed(loaded.model, stock, experts_implementation=implementation):
        discoveries = find_discoveries(loaded, arms, calibration, probes, layers)
    removals = run_ablation(loaded, probes, layers, settings.horizon)
    return _write(removals.assign(arm=stock.id), discoveries, arms, config, results / "ablation")


def _write(
    removals: pd.DataFrame,
    discoveries: pd.DataFrame,
    arms: Sequence[BH],
    config: StudyConfig,
    folder: Path,
) -> pd.DataFrame:
    for name, rows in {"removals": removals, "discoveries": discoveries}.items():
        with atomic_path(folder / f"{name}.parquet") as temporary:
            rows.to_parquet(temporary, index=False)
    confidence = config.statistics.confidence
    keys = [(arm.id, arm.null, arm.alpha) for arm in arms]
    table = false_discoveries(
        labelled(removals, discoveries, keys),
        config.analysis.ablation.epsilon,
        confidence=confidence,
    )
    write_csv(table, folder / "ablation.csv")
    importance = weight_and_importance(
        removals,
        confidence=confidence,
        resamples=config.statistics.resamples,
        rng=np.random.default_rng(config.seed),
    )
    write_csv(importance, folder / "weight_importance.csv")
    return table


def spaced_layers(layers: int, wanted: int) -> list[int]:
    """Return layer indices, evenly spaced, first and last included.

    >>> spaced_layers(16, 4), spaced_layers(2, 5)
    ([0, 5, 10, 15], [0, 1])
    """
    return sorted({round(layer) for layer in np.linspace(0, layers - 1, min(wanted, layers))})


def choose_probes(config: StudyConfig, results: Path, loaded: LoadedModel) -> list[Probe]:
    """Draw documents, and tokens in them, by the seed of the study.

    Raises:
        InputError: the text has fewer tokens than asked for.
    """
    settings = config.analysis.ablation
    window = min(settings.context, max_length(loaded.model.config, config.evaluation.window))
    encoder = Encoder(loaded.tokenizer, window)
    rng = np.random.default_rng(config.seed)
    items = read_text(config, results)
    probes, left = [], settings.tokens
    each = max(TOKENS_PER_DOCUMENT, -(-settings.tokens // len(items)))
    for index in rng.permutation(len(items)):
        if left <= 0:
            break
        request = encoder.rolling([item_text(items[index])])[0][0]
        ids = [*request.input_ids, request.target_ids[-1]]
        positions = _positions(len(ids), min(left, each), settings.horizon, rng)
        if positions:
            probes.append(Probe(items[index].id, torch.tensor(ids), tuple(positions)))
            left -= len(positions)
    if left > 0:
        raise InputError(
            f"analysis.ablation.tokens is {settings.tokens}; allowed: at most "
            f"{settings.tokens - left}, which is what the text has at this context and horizon"
        )
    return probes


def _positions(length: int, wanted: int, horizon: int, rng: np.random.Generator) -> list[int]:
    allowed = np.arange(FIRST_POSITION, length - horizon)
    return sorted(rng.choice(allowed, min(wanted, allowed.size), replace=False).tolist())


def find_discoveries(
    loaded: LoadedModel,
    arms: Sequence[BH],
    calibration: Calibration,
    probes: Sequence[Probe],
    layers: Sequence[int],
) -> pd.DataFrame:
    """Return what BH discovers on the router logits of the unchanged model, one row per expert.

    Experts that only the floor adds are not discoveries. Columns:
    ``arm``, ``null``, ``alpha``, ``document``, ``position``, ``layer``, ``expert``.

    Raises:
        InputError: a router logit is not finite.
    """
    tokens = [(probe.document, position) for probe in probes for position in probe.positions]
    token_T = pd.DataFrame(tokens, columns=["document", "position"])
    inputs = router_inputs(loaded, probes, layers)
    experts = find_routers(loaded.model)[0].num_experts
    tables = []
    for arm in arms:
        select = arm.selector(calibration, experts)
        scorer = ExpertScorer.of(arm, calibration)
        for layer, seen in inputs.items():
            scored = seen if scorer is None else scorer(seen)
            selection = select(scored, seen.logits_TE.softmax(-1))
            token, expert = _chosen_by_rule(selection.index_TK, selection.rejected_T)
            keys = {"arm": arm.id, "null": arm.null, "alpha": arm.alpha}
            tables.append(token_T.iloc[token].assign(layer=layer, expert=expert, **keys))
    return pd.concat(tables, ignore_index=True)


def _chosen_by_rule(
    index_TK: torch.Tensor, rejected_T: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return the (token, expert) pairs before floor and cap."""
    chosen_TK = torch.arange(index_TK.shape[1]) < rejected_T[:, None]
    return chosen_TK.nonzero()[:, 0].numpy(), index_TK[chosen_TK].numpy()


def router_inputs(
    loaded: LoadedModel, probes: Sequence[Probe], layers: Sequence[int]
) -> dict[int, RouterInputs]:
    """Return the router inputs of the probed tokens, by layer, on the host.

    Centred router vectors are replaced by their norms; nulls use nothing else of them.

    Raises:
        InputError: a router logit is not finite.
    """
    seen = [_seen_by_routers(loaded, probe) for probe in probes]
    logits_LTE, hidden_LTH = (torch.cat(part, dim=1) for part in zip(*seen, strict=True))
    routers = find_routers(loaded.model)
    return {
        layer: RouterInputs(
            layer,
            logits_LTE[layer],
            hidden_TH=hidden_LTH[layer],
            centred_norm_E=centred_norms(weight_of(routers[layer].module)).cpu(),
            rule=routers[layer].rule,
        )
        for layer in layers
    }


def _seen_by_routers(loaded: LoadedModel, probe: Probe) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the router logits (L, T, E) and inputs (L, T, H) of a probe's tokens, float32."""
    hidden, position_T = [], list(probe.positions)

    def see(_: int, hidden_SH: torch.Tensor, __: torch.Tensor) -> None:
        hidden.append(hidden_SH[position_T].float().cpu())

    # The last token is only predicted.
    with watched(loaded.model, see):
        logits_LSE, _ = watch_ids(loaded.model, probe.ids_S[:-1], "ablation")
    return logits_LSE[:, position_T], torch.stack(hidden)


def run_ablation(
    loaded: LoadedModel, probes: Sequence[Probe], layers: Sequence[int], horizon: int
) -> pd.DataFrame:
    """Remove every expert that the stock model selected for some tokens, one at a time.

    Args:
        loaded: the model.
        probes: documents and tokens.
        layers: layers to intervene in.
        horizon: positions whose next-token loss is followed, the token's own first.

    Returns:
        One row per removal. ``change`` is that of the token's own loss, ``change_window`` the sum
        over the ``followed`` positions; ``noise_floor`` is the change of the token's own loss by
        rounding alone, when no weight changes in another batch. Losses are in nats.

    Raises:
        InputError: see :func:`~moe_routing.engine.toggling.toggling`.
    """
    router = find_routers(loaded.model)[0]
    unselected = min(router.top_k, router.num_experts - 1)
    tables = []
    with toggling(loaded.model, max(p.ids_S.numel() - 1 for p in probes), "ablation") as toggle:
        bar = tqdm(total=sum(len(p.positions) for p in probes), desc="remove experts", unit="token")
        for batch in batches(probes, len(layers) * router.top_k, horizon):
            tokens = sum(len(probe.positions) for probe in batch)
            rank_PA = torch.arange(router.top_k).expand(tokens, -1)
            effects = toggle(batch, dict.fromkeys(layers, rank_PA), steps=horizon)
            quiet = {layers[0]: torch.full((tokens, 1), unselected)}
            stock_PSH = effects.stock_PSH[:, :1]
            noise = toggle(batch, quiet, weightless=True, stock_PSH=stock_PSH)
            tables.append(_removals(batch, layers, horizon, effects, noise))
            bar.update(tokens)
        bar.close()
    return pd.concat(tables, ignore_index=True)


def _removals(
    batch: Sequence[Probe], layers: Sequence[int], horizon: int, effects: Effects, noise: Effects
) -> pd.DataFrame:
    """Return the rows of one batch, by token, layer and rank."""
    tokens = [(p, position) for p in batch for position in p.positions]
    rows = product(range(len(tokens)), layers, range(effects.expert_LPA.shape[2]))
    token, layer, rank = np.array(list(rows)).T
    flat = {
        name: value_LPA.transpose(0, 1).flatten().numpy()
        for name, value_LPA in {
            "expert": effects.expert_LPA,
            "weight": effects.weight_LPA.double(),
            "change": effects.change_LPAS[..., 0],
            "change_window": effects.change_LPAS.sum(-1),
        }.items()
    }
    by_token = {
        "document": [probe.document for probe, _ in tokens],
        "position": [position for _, position in tokens],
        "followed": [min(horizon, p.ids_S.numel() - 1 - position) for p, position in tokens],
        "noise_floor": noise.change_LPAS[0, :, 0, 0].abs().tolist(),
    }
    repeated = {name: np.array(values)[token] for name, values in by_token.items()}
    return pd.DataFrame({
        "document": repeated["document"], "position": repeated["position"], "layer": layer,
        "expert": flat["expert"], "rank": rank, "weight": flat["weight"],
        "change": flat["change"], "change_window": flat["change_window"],
        "followed": repeated["followed"], "noise_floor": repeated["noise_floor"],
    })  # fmt: skip
