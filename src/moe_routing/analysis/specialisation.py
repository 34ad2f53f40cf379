"""Co-activation and specialisation of experts, as in the OLMoE paper (2409.02060, section 5).

Pure functions of arrays. Shape letters: L layers, T tokens, E experts, K selected experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

FEWEST_OCCURRENCES = 10
"""Token ids that occur less often say little about their routing."""


def coactivation(index_LTK: NDArray[np.int64], experts: int) -> pd.DataFrame:
    """Return how often two experts are selected together, over all pairs.

    proportion = N(a and b) / N(a): of the tokens that expert a gets, the proportion that b gets as
    well (OLMoE paper, section 5.2). It is not symmetric. Every ordered pair a != b has a row; the
    proportion is missing where a was never selected. ``lift`` is the proportion over b's proportion
    of all tokens: 1 if the two are selected independently.

    Args:
        index_LTK: distinct experts of each token, (layers, tokens, selected).
        experts: number of experts.
    """
    tokens = index_LTK.shape[1]
    tables = []
    for layer, index_TK in enumerate(index_LTK):
        chosen_TE = np.zeros((tokens, experts))
        np.put_along_axis(chosen_TE, index_TK, 1.0, axis=1)
        both_EE = chosen_TE.T @ chosen_TE
        load_E = both_EE.diagonal()
        with np.errstate(invalid="ignore", divide="ignore"):
            proportion_EE = both_EE / load_E[:, None]
            lift_EE = proportion_EE / (load_E / tokens)
        first, second = np.nonzero(~np.eye(experts, dtype=bool))
        tables.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "expert_a": first,
                    "expert_b": second,
                    "tokens_a": load_E[first].astype(int),
                    "proportion": proportion_EE[first, second],
                    "lift": lift_EE[first, second],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def domain_specialisation(load_by_domain: Mapping[str, tuple[NDArray, int]]) -> pd.DataFrame:
    """Return the proportion of each domain's tokens that goes to each expert.

    proportion = N(expert, domain) / N(domain) (OLMoE paper, section 5.3); a router that ignores the
    domain has the same one everywhere. ``overall`` is the mean over domains, with equal weights,
    and ``lift`` is proportion / overall.

    Args:
        load_by_domain: for each domain its loads, (layers, experts), and its number of tokens.
    """
    proportion_DLE = np.stack([load / tokens for load, tokens in load_by_domain.values()])
    overall_LE = proportion_DLE.mean(0)
    _, layers, experts = proportion_DLE.shape
    layer_X, expert_X = np.divmod(np.arange(layers * experts), experts)
    tables = []
    for (domain, (_, tokens)), proportion_LE in zip(
        load_by_domain.items(), proportion_DLE, strict=True
    ):
        with np.errstate(invalid="ignore", divide="ignore"):
            lift_LE = proportion_LE / overall_LE
        tables.append(
            pd.DataFrame(
                {
                    "domain": domain,
                    "layer": layer_X,
                    "expert": expert_X,
                    "proportion": proportion_LE.ravel(),
                    "overall": overall_LE.ravel(),
                    "lift": lift_LE.ravel(),
                    "n_tokens": tokens,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def vocabulary_specialisation(
    first_LT: NDArray[np.int64], ids: Mapping[str, NDArray[np.int64]], rng: np.random.Generator
) -> pd.DataFrame:
    """Return how exclusively token ids go to one first-choice expert, by layer.

    For a token id x, max over experts of N(x to expert as first choice) / N(x), averaged over
    token ids (OLMoE paper, section 5.4, with k = 1): ``mean`` over all ids, as in the paper, and
    ``mean_frequent`` over ids with at least 10 occurrences. An id that occurs once always has 1, so
    ``shuffled`` and ``shuffled_frequent`` are the same numbers after the ids were permuted over the
    tokens: the effect of rarity alone.

    Args:
        first_LT: first-choice expert of each token, (layers, tokens).
        ids: for each role (such as ``input``, ``next``, ``predicted``) a token id for each token.
        rng: permutes the ids.
    """
    rows = []
    for role, id_T in ids.items():
        shuffled_T = rng.permutation(id_T)
        for layer, first_T in enumerate(first_LT):
            proportion_X, count_X = largest_proportion(first_T, id_T)
            noise_X, noise_count_X = largest_proportion(first_T, shuffled_T)
            often, noise_often = count_X >= FEWEST_OCCURRENCES, noise_count_X >= FEWEST_OCCURRENCES
            rows.append(
                {
                    "role": role,
                    "layer": layer,
                    "mean": proportion_X.mean(),
                    "shuffled": noise_X.mean(),
                    "mean_frequent": _mean(proportion_X[often]),
                    "shuffled_frequent": _mean(noise_X[noise_often]),
                    "n_ids": proportion_X.size,
                    "n_frequent": int(often.sum()),
                    "n_tokens": id_T.size,
                }
            )
    return pd.DataFrame(rows)


def largest_proportion(
    expert_T: NDArray[np.int64], id_T: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return, for each token id in sorted order, the proportion of its main expert and its count.

    >>> largest_proportion(np.array([0, 0, 1, 2]), np.array([7, 7, 7, 9]))[0].round(2)
    array([0.67, 1.  ])
    """
    _, index_T, count_X = np.unique(id_T, return_inverse=True, return_counts=True)
    pairs, together = np.unique(np.stack([index_T, expert_T]), axis=1, return_counts=True)
    most_X = np.zeros(count_X.size, dtype=np.int64)
    np.maximum.at(most_X, pairs[0], together)
    return most_X / count_X, count_X


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")
