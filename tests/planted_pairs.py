"""Toggled pairs with known effects: all of a model's own choice, and a sample of the others."""

from __future__ import annotations

import numpy as np

from moe_routing.analysis.pairs import ToggledPairs

LAYERS, EXPERTS, TOP_K = 2, 8, 3
WEIGHT = (EXPERTS - TOP_K) / 2
"""Of the experts that the model did not choose, two of five are toggled."""


def planted_pairs(
    kl_LTE, gain_LTE=None, *, per_document=1, seed=0, toggle_all=False
) -> ToggledPairs:
    """Return pairs of a model whose own choice are the first three experts.

    Args:
        kl_LTE: KL of toggling, by layer, token and expert.
        gain_LTE: by how much the presence lowers the loss; None: as much as the KL.
        per_document: tokens of a document.
        seed: of the sample of the other experts.
        toggle_all: whether all experts are toggled.
    """
    kl_LTE = np.asarray(kl_LTE, dtype=float)
    gain_LTE = kl_LTE if gain_LTE is None else np.asarray(gain_LTE, dtype=float)
    own_LTE = np.zeros(kl_LTE.shape, dtype=bool)
    own_LTE[..., :TOP_K] = True
    rank_LTN = np.random.default_rng(seed).random(kl_LTE[..., TOP_K:].shape).argsort(-1).argsort(-1)
    toggled_LTE = own_LTE.copy()
    toggled_LTE[..., TOP_K:] = toggle_all | (rank_LTN < 2)
    layer_P, token_P, expert_P = toggled_LTE.nonzero()
    own_P = own_LTE[toggled_LTE]
    return ToggledPairs(
        layer_P, token_P, expert_P, own_P,
        weight_P=np.where(own_P | toggle_all, 1.0, WEIGHT),
        kl_P=kl_LTE[toggled_LTE],
        gain_P=gain_LTE[toggled_LTE],
        document_T=np.arange(kl_LTE.shape[1]) // per_document,
        own_LTE=own_LTE,
    )  # fmt: skip
