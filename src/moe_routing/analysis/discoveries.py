"""What rules discover on toggled tokens, and how much of it is false, harmful or missing.

A decision is the routing of one token in one layer. A discovery is an expert that a rule selects
there. All experts of the model's own choice are toggled, and a random sample of the others, which
count with their sampling weight.

Shape letters: L layers (with one more for all of them), T tokens, E experts, P toggled pairs, C
criteria, R parts, S series.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from moe_routing.analysis.outputs import ADDED, ALL_LAYERS, EITHER, NO_NULL, REMOVED
from moe_routing.analysis.pairs import Array, Mask, ToggledPairs, with_all_layers
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.scores import ExpertScorer
from moe_routing.routing.strategies.testing import MultipleTesting
from moe_routing.routing.toggles import Toggles
from moe_routing.statistics.bootstrap import (
    RatioBootstrap,
    bootstrap_items,
    studentised_interval,
)
from moe_routing.statistics.proportions import clustered_ratio, exact_interval

COLUMNS = (
    "null", "alpha", "effect", "epsilon", "primary", "part", "layer", "n_discoveries",
    "mean_discoveries", "any_proportion", "false", "false_low", "false_high", "fdr", "fdr_low",
    "fdr_high", "harmful", "harmful_low", "harmful_high", "n_toggled", "n_decisions",
    "n_documents",
)  # fmt: skip
"""Those of the table of false discoveries."""


@dataclass(frozen=True)
class Criterion:
    """When a discovery is false.

    Attributes:
        effect: ``kl``: toggling the expert changes the prediction by a KL below epsilon; ``loss``:
            its presence does not lower the loss of the realised next token by epsilon (one-sided).
        epsilon: threshold, nats.
    """

    effect: str
    epsilon: float

    def false_P(self, pairs: ToggledPairs) -> Mask:
        """Return which pairs would be false discoveries."""
        return (pairs.kl_P if self.effect == "kl" else pairs.gain_P) < self.epsilon

    def harmful_P(self, pairs: ToggledPairs) -> Mask:
        """Return which experts raise the realised loss by at least epsilon; none for KL."""
        if self.effect == "kl":
            return np.zeros_like(pairs.own_P)
        return pairs.gain_P <= -self.epsilon


@dataclass(frozen=True)
class SelectedByRule:
    """What a rule selects.

    Attributes:
        null: its null, or :data:`NO_NULL` for the model's own choice.
        alpha: its level; NaN without one.
        selected_LTE: the selected experts.
        primary: for each effect the epsilon that the text speaks of.
    """

    null: str
    alpha: float
    selected_LTE: Mask
    primary: Mapping[str, float]


def selected(
    rule: MultipleTesting, calibration: Calibration, toggles: Toggles, *, bounded: bool = False
) -> Mask:
    """Return what a rule selects for the toggled tokens, (layers, tokens, experts).

    Args:
        rule: the strategy.
        calibration: with its null.
        toggles: of the tokens.
        bounded: with floor and cap; without, the rule must have no cap.

    Raises:
        InputError: the null was not fitted, or on too few tokens for the level.
    """
    experts = toggles.num_experts
    select = rule.selector(calibration, experts)
    scorer = ExpertScorer.of(rule, calibration)
    parts = []
    for layer in range(toggles.num_layers):
        seen = toggles.inputs(layer, calibration.sample.centred_norm_LE)
        selection = select(seen if scorer is None else scorer(seen), seen.softmax_TE)
        count_T = selection.count_T if bounded else selection.rejected_T
        index_TK = selection.index_TK
        chosen_TK = torch.arange(index_TK.shape[1]) < count_T[:, None]
        mask_TE = torch.zeros(len(index_TK), experts + 1, dtype=torch.bool)
        parts.append(mask_TE.scatter_(1, index_TK, chosen_TK)[:, :experts])
    return torch.stack(parts).numpy()


def own_choice(pairs: ToggledPairs, primary: Mapping[str, float]) -> SelectedByRule:
    """Return the model's own choice as if a rule had discovered all of it."""
    return SelectedByRule(NO_NULL, np.nan, pairs.own_LTE, primary)


def false_discoveries(
    pairs: ToggledPairs,
    found: SelectedByRule,
    criteria: Sequence[Criterion],
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return the false discoveries of a rule, one row per criterion, part and layer (and ``all``).

    Columns: ``null``, ``alpha``, ``effect``, ``epsilon``, ``primary`` (whether the text speaks of
    this epsilon), ``part`` (removed: experts of the model's own choice; added: others; all),
    ``layer``; ``n_discoveries`` in the sample of tokens, ``mean_discoveries`` per decision,
    ``any_proportion`` of decisions with one; ``false``: the proportion of all discoveries that are
    false, with Wilson limits at the design effect of documents (``false_low``, ``false_high``);
    ``fdr``: the mean over decisions of V / max(R, 1), with V the weighted number of false ones
    among R discoveries, and studentised bootstrap limits over documents (``fdr_low``,
    ``fdr_high``), cut off at 0 and 1; ``harmful``: the proportion of discoveries that raise the
    realised loss by epsilon or more, with limits as for ``false``; empty for KL; ``n_toggled``
    discoveries whose effect was measured, ``n_decisions``, ``n_documents``.
    """
    found_P = pairs.at(found.selected_LTE)
    false_PC = np.stack([one.false_P(pairs) for one in criteria], axis=1)
    harmful_PC = np.stack([one.harmful_P(pairs) for one in criteria], axis=1)
    tables, proportion_TLRC = [], []
    for part, here_P, here_LTE in (
        (REMOVED, pairs.own_P, pairs.own_LTE),
        (ADDED, ~pairs.own_P, ~pairs.own_LTE),
        (EITHER, True, True),
    ):
        weight_P = pairs.weight_P * (found_P & here_P)
        count_TL1 = (found.selected_LTE & here_LTE).sum(-1).T[..., None].astype(float)
        false_TLC = pairs.sums(weight_P[:, None] * false_PC)
        harmful_TLC = pairs.sums(weight_P[:, None] * harmful_PC)
        proportion_TLRC.append(with_all_layers(false_TLC / count_TL1.clip(min=1), mean=True))
        table = _counts(pairs, count_TL1, weight_P, criteria).assign(part=part)
        for name, value_TLC in (("false", false_TLC), ("harmful", harmful_TLC)):
            columns = (name, f"{name}_low", f"{name}_high")
            for column, value_S in zip(
                columns, pooled(pairs, value_TLC, weight_P, confidence), strict=True
            ):
                table[column] = value_S
        tables.append(table)
    boot = bootstrap_items(
        np.stack(proportion_TLRC, axis=1).reshape(pairs.tokens, -1),
        np.ones(pairs.tokens),
        pairs.document_T,
        resamples=resamples,
        rng=rng,
    )
    low_S, high_S = rate_limits(boot, confidence)
    rates = {"fdr": boot.ratio_S, "fdr_low": low_S, "fdr_high": high_S}
    table = pd.concat(tables, ignore_index=True).assign(
        null=found.null, alpha=found.alpha, n_documents=pairs.documents, **rates
    )
    of_kl = table["effect"] == "kl"
    table.loc[of_kl, ["harmful", "harmful_low", "harmful_high"]] = np.nan
    table["primary"] = table["epsilon"] == table["effect"].map(dict(found.primary))
    return table[list(COLUMNS)]


def rate_limits(boot: RatioBootstrap, confidence: float) -> tuple[Array, Array]:
    """Return studentised bootstrap limits of rates, cut off at 0 and 1, (series,) each.

    Documents without any false discovery have nothing to resample: the upper limit then is that of
    no success in as many independent trials (Clopper & Pearson 1934).
    """
    low_S, high_S = studentised_interval(boot, confidence)
    _, most = exact_interval(0, boot.clusters, confidence)
    return low_S.clip(0, 1), np.where(boot.ratio_S == 0, most, high_S.clip(0, 1))


def _counts(
    pairs: ToggledPairs, count_TL1: Array, weight_P: Array, criteria: Sequence[Criterion]
) -> pd.DataFrame:
    """Return the columns of a part that no criterion changes, by layer and criterion."""
    toggled_TL1 = pairs.sums((weight_P > 0).astype(float))
    tokens_L = np.append(np.full(pairs.layers, pairs.tokens), pairs.tokens * pairs.layers)
    some_L, count_L, toggled_L = (
        with_all_layers(value_TL1, mean=False).sum(0)[:, 0]
        for value_TL1 in (count_TL1 > 0, count_TL1, toggled_TL1)
    )
    layers = pd.DataFrame(
        {
            "layer": layer_names(pairs.layers),
            "n_discoveries": count_L.astype(int),
            "mean_discoveries": count_L / tokens_L,
            "any_proportion": some_L / tokens_L,
            "n_toggled": toggled_L.astype(int),
            "n_decisions": tokens_L,
        }
    )
    named = pd.DataFrame({"effect": [one.effect for one in criteria],
                          "epsilon": [one.epsilon for one in criteria]})  # fmt: skip
    return layers.merge(named, how="cross")


def pooled(
    pairs: ToggledPairs, part_TLC: Array, weight_P: Array, confidence: float
) -> tuple[Array, Array, Array]:
    """Return proportions of pairs over all tokens, by layer and column, with Wilson limits.

    Args:
        pairs: the pairs.
        part_TLC: by decision, the weight of the pairs that have each of several properties.
        weight_P: weight of each pair in the whole, 0 for pairs that are not in it.
        confidence: level of the limits.

    Returns:
        Proportion, lower and upper limit, each (layers and all, columns) flattened.
    """
    columns = part_TLC.shape[-1]
    squares = np.stack([weight_P, weight_P**2], axis=1)
    total_TL2 = with_all_layers(pairs.sums(squares), mean=False)
    whole_L, square_L = total_TL2.sum(0).T
    size_L = np.divide(whole_L**2, square_L, out=np.zeros_like(whole_L), where=square_L > 0)
    return clustered_ratio(
        with_all_layers(part_TLC, mean=False).reshape(pairs.tokens, -1),
        total_TL2[..., :1].repeat(columns, axis=-1).reshape(pairs.tokens, -1),
        pairs.document_T,
        size_L.repeat(columns),
        confidence,
    )


def layer_names(layers: int) -> list[str]:
    """Return the layers as words, and all of them."""
    return [*map(str, range(layers)), ALL_LAYERS]


def left_out(
    pairs: ToggledPairs, found: SelectedByRule, epsilons: Sequence[float], *, confidence: float
) -> pd.DataFrame:
    """Return how many of the needed experts a rule leaves out, by epsilon, layer and part.

    Columns: ``epsilon`` (an expert is needed if toggling it changes the prediction by a KL of at
    least epsilon), ``part`` (removed: of the model's own choice; all: of all experts, the others
    by weight), ``layer``; ``mean_needed`` experts per decision; ``left_out``: the proportion of
    them that the rule does not select, with Wilson limits at the design effect of documents
    (``low``, ``high``); ``effect_left_out``: the proportion of the sum of their KLs; ``n_tokens``,
    ``n_documents``.
    """
    missing_P = ~pairs.at(found.selected_LTE)
    rows = []
    for epsilon in epsilons:
        for part, here_P in ((REMOVED, pairs.own_P), (EITHER, np.ones_like(pairs.own_P))):
            weight_P = pairs.weight_P * (here_P & (pairs.kl_P >= epsilon))
            missed_TL1 = pairs.sums(weight_P * missing_P)
            value_L, low_L, high_L = pooled(pairs, missed_TL1, weight_P, confidence)
            effects = [weight_P * pairs.kl_P * missing_P, weight_P * pairs.kl_P, weight_P]
            sums_TLC = pairs.sums(np.stack(effects, axis=1))
            lost_L, effect_L, _ = with_all_layers(sums_TLC, mean=False).sum(0).T
            rows.append(
                pd.DataFrame(
                    {
                        "epsilon": epsilon,
                        "part": part,
                        "layer": layer_names(pairs.layers),
                        "mean_needed": with_all_layers(sums_TLC, mean=True).mean(0)[:, 2],
                        "left_out": value_L,
                        "low": low_L,
                        "high": high_L,
                        "effect_left_out": np.divide(
                            lost_L, effect_L, out=np.full_like(lost_L, np.nan), where=effect_L > 0
                        ),
                    }
                )
            )
    sizes = {"n_tokens": pairs.tokens, "n_documents": pairs.documents}
    return pd.concat(rows, ignore_index=True).assign(**sizes)


def false_kept(
    pairs: ToggledPairs,
    kept_LTE: Mask,
    epsilon: float,
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return the false discovery rate among the experts that a routing keeps.

    Columns: ``layer`` (and ``all``), ``fdr`` (mean over decisions of V / max(R, 1)) with
    studentised bootstrap limits over documents (``low``, ``high``), ``mean_kept`` experts per
    decision, ``n_tokens``, ``n_documents``.

    Args:
        pairs: toggled in the states of the model whose routing is judged.
        kept_LTE: the experts that its routing keeps, as far as they were toggled or sampled.
        epsilon: a kept expert is false if toggling it changes the prediction by a smaller KL.
        confidence: level of the intervals.
        resamples: number of bootstrap resamples.
        rng: source of randomness.
    """
    false_P = pairs.weight_P * (pairs.at(kept_LTE) & (pairs.kl_P < epsilon))
    count_TL = kept_LTE.sum(-1).T.astype(float)
    proportion_TL1 = pairs.sums(false_P) / count_TL[..., None].clip(min=1)
    boot = bootstrap_items(
        with_all_layers(proportion_TL1, mean=True)[..., 0],
        np.ones(pairs.tokens),
        pairs.document_T,
        resamples=resamples,
        rng=rng,
    )
    low_L, high_L = rate_limits(boot, confidence)
    return pd.DataFrame(
        {
            "layer": layer_names(pairs.layers),
            "fdr": boot.ratio_S,
            "low": low_L,
            "high": high_L,
            "mean_kept": with_all_layers(count_TL[..., None], mean=True)[..., 0].mean(0),
            "n_tokens": pairs.tokens,
            "n_documents": pairs.documents,
        }
    )
