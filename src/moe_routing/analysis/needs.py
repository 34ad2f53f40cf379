"""N(epsilon): how many experts a token needs, and whether needed ones help with what follows.

An expert is needed if toggling it changes the prediction by a KL of at least epsilon. Only experts
of the model's own choice count towards N(epsilon): leaving any other out is the model as it is, so
that one whose addition changes the prediction is consequential, not needed.

Shape letters: L layers (with one more for their mean), T tokens, N epsilons, D documents, B
resamples, S series.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_routing.analysis.discoveries import layer_names, pooled
from moe_routing.analysis.outputs import ADDED, REMOVED
from moe_routing.analysis.pairs import Array, Mask, ToggledPairs, with_all_layers
from moe_routing.statistics.bootstrap import (
    bootstrap_items,
    bootstrap_ratios,
    cluster_sums,
    studentised_interval,
)

ALL_TOKENS = "all tokens"
THIRDS: Mapping[str, tuple[str, str, str]] = {
    "frequency": ("rare", "middle", "frequent"),
    "position": ("early", "middle", "late"),
    "loss": ("low", "middle", "high"),
}
"""Columns of a token table that are cut into thirds, and the names of these."""
WORD_START = ("inside a word", "word start")


def token_classes(tokens: pd.DataFrame) -> dict[str, dict[str, Mask]]:
    """Return classes of tokens by what they are grouped by: the tokens of each, (T,).

    Thirds are those of the sample; equal values are in the same one, so that sizes may differ.

    Args:
        tokens: ``frequency`` in calibration text, ``position`` in the document, ``word_start``, and
            ``loss`` of the next token in the stock model, in nats.
    """
    groups: dict[str, dict[str, Mask]] = {}
    for column, names in THIRDS.items():
        value_T = tokens[column].to_numpy(dtype=float)
        bounds = np.quantile(value_T, [1 / 3, 2 / 3])
        third_T = np.searchsorted(bounds, value_T, side="left")
        groups[column] = {name: third_T == index for index, name in enumerate(names)}
    start_T = tokens["word_start"].to_numpy(dtype=bool)
    groups["word_start"] = {name: start_T == bool(index) for index, name in enumerate(WORD_START)}
    return groups


def counts(pairs: ToggledPairs, epsilons: Sequence[float]) -> Array:
    """Return how many experts of the model's own choice are needed, (T, L, N)."""
    needed_PN = pairs.own_P[:, None] & (pairs.kl_P[:, None] >= np.asarray(epsilons))
    return pairs.sums(needed_PN.astype(float))


def needed_experts(
    pairs: ToggledPairs,
    tokens: pd.DataFrame,
    epsilons: Sequence[float],
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return N(epsilon), one row per class of tokens, layer (and ``all``: their mean) and epsilon.

    Columns: ``group`` (what the classes are made of), ``class``, ``layer``, ``epsilon``, ``mean``
    needed experts per token with studentised bootstrap limits over documents (``low``, ``high``),
    ``none`` and ``every``: the proportions of decisions in which none, or all, of the model's own
    choice are needed; ``n_tokens``, ``n_documents``.
    """
    count_TLN = counts(pairs, epsilons)
    top_k = int(pairs.own_LTE[0, 0].sum())
    mean_TLN, none_TLN, every_TLN = (
        with_all_layers(value_TLN, mean=True)
        for value_TLN in (count_TLN, count_TLN == 0, count_TLN == top_k)
    )
    index = pd.MultiIndex.from_product(
        [layer_names(pairs.layers), epsilons], names=["layer", "epsilon"]
    )
    parts = []
    for group, name, chosen_T in _classes(tokens):
        boot = bootstrap_items(
            mean_TLN[chosen_T].reshape(chosen_T.sum(), -1),
            np.ones(chosen_T.sum()),
            pairs.document_T[chosen_T],
            resamples=resamples,
            rng=rng,
        )
        low_S, high_S = studentised_interval(boot, confidence)
        columns = {
            "mean": boot.ratio_S,
            "low": low_S.clip(0, top_k),
            "high": high_S.clip(0, top_k),
            "none": none_TLN[chosen_T].mean(0).ravel(),
            "every": every_TLN[chosen_T].mean(0).ravel(),
        }
        table = pd.DataFrame(columns, index=index).reset_index()
        table.insert(0, "class", name)
        table.insert(0, "group", group)
        sizes = {"n_tokens": int(chosen_T.sum()), "n_documents": boot.clusters}
        parts.append(table.assign(**sizes))
    return pd.concat(parts, ignore_index=True)


def _classes(tokens: pd.DataFrame) -> Iterator[tuple[str, str, Mask]]:
    """Yield all tokens and every class that has any."""
    yield ALL_TOKENS, ALL_TOKENS, np.ones(len(tokens), dtype=bool)
    for group, classes in token_classes(tokens).items():
        for name, chosen_T in classes.items():
            if chosen_T.any():
                yield group, name, chosen_T


def class_contrasts(
    pairs: ToggledPairs,
    tokens: pd.DataFrame,
    epsilons: Sequence[float],
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return the difference of N(epsilon), mean of the layers, between the outer classes.

    Columns: ``group``, ``first`` and ``second`` class, ``epsilon``, ``difference`` (second minus
    first, experts per token) with studentised bootstrap limits over documents, which may have
    tokens of both (``low``, ``high``).
    """
    mean_TN = counts(pairs, epsilons).mean(1)
    parts = []
    for group, classes in token_classes(tokens).items():
        (first, one_T), *_, (second, other_T) = classes.items()
        if not (one_T.any() and other_T.any()):
            continue
        pseudo_DN = _pseudo_values(mean_TN, one_T, other_T, pairs.document_T)
        boot = bootstrap_ratios(pseudo_DN, np.ones_like(pseudo_DN), resamples=resamples, rng=rng)
        low_N, high_N = studentised_interval(boot, confidence)
        columns = {"difference": boot.ratio_S, "low": low_N, "high": high_N}
        named = {"group": group, "first": first, "second": second, "epsilon": epsilons}
        parts.append(pd.DataFrame(named | columns))
    return pd.concat(parts, ignore_index=True)


def _pseudo_values(mean_TN: Array, one_T: Mask, other_T: Mask, document_T: NDArray) -> Array:
    """Return values of documents whose mean is the difference of two classes' means, (D, N).

    The difference plus the document's linearised part in it, so that documents are resampled as a
    whole although some have no token of a class.
    """
    documents = len(np.unique(document_T))
    value_DN = np.zeros((documents, mean_TN.shape[1]))
    for sign, chosen_T in ((-1, one_T), (1, other_T)):
        total_DN = cluster_sums(mean_TN * chosen_T[:, None], document_T)
        count_D1 = cluster_sums(chosen_T.astype(float), document_T)[:, None]
        mean_N = total_DN.sum(0) / count_D1.sum()
        value_DN += sign * (mean_N + documents * (total_DN - mean_N * count_D1) / count_D1.sum())
    return value_DN


def presence(pairs: ToggledPairs, epsilons: Sequence[float], *, confidence: float) -> pd.DataFrame:
    """Return what consequential experts do to the loss of the realised next token.

    Columns: ``epsilon``, ``part`` (removed: experts of the model's own choice, which are needed;
    added: others, which are consequential), ``layer`` (and ``all``), ``mean_experts`` of the part
    with a KL of at least epsilon per decision (others by weight), ``lowers_loss``: the proportion
    of them whose presence lowers the realised loss, with Wilson limits at the design effect of
    documents (``low``, ``high``), ``n_toggled``.
    """
    rows = []
    for epsilon in epsilons:
        for part, here_P in ((REMOVED, pairs.own_P), (ADDED, ~pairs.own_P)):
            some_P = here_P & (pairs.kl_P >= epsilon)
            weight_P = pairs.weight_P * some_P
            value_L, low_L, high_L = pooled(
                pairs, pairs.sums(weight_P * (pairs.gain_P > 0)), weight_P, confidence
            )
            sums_TL2 = pairs.sums(np.stack([weight_P, some_P], axis=1))
            columns = {
                "epsilon": epsilon,
                "part": part,
                "layer": layer_names(pairs.layers),
                "mean_experts": with_all_layers(sums_TL2, mean=True).mean(0)[:, 0],
                "lowers_loss": value_L,
                "low": low_L,
                "high": high_L,
                "n_toggled": with_all_layers(sums_TL2, mean=False).sum(0)[:, 1].astype(int),
            }
            rows.append(pd.DataFrame(columns))
    return pd.concat(rows, ignore_index=True)
