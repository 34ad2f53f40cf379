"""Simulated toggles, where the effect of every expert is known."""

from __future__ import annotations

import numpy as np
import torch

from moe_routing.routing.rule import ModelRule
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.toggles import Toggles

LAYERS, TOKENS, EXPERTS, EPSILON = 2, 1600, 16, 1e-4


def simulate():
    """Return a sample, toggles, and the probability and effect of every expert.

    Tokens are two per document; the top 4 and a third of the other experts are toggled.
    """
    rng = np.random.default_rng(5)
    logits_LTE = 1.5 * torch.from_numpy(rng.standard_normal((LAYERS, TOKENS, EXPERTS))).float()
    probability_LTE = logits_LTE.softmax(-1)
    document_T = torch.arange(TOKENS) // 2
    token_T = torch.from_numpy(rng.normal(0, 1, TOKENS // 2))[document_T]
    noise_LTE = token_T[:, None] + torch.from_numpy(rng.normal(0, 1, probability_LTE.shape))
    kl_LTE = 0.01 * probability_LTE.double() ** 2 * noise_LTE.exp()
    order_LTE = probability_LTE.argsort(-1, descending=True)
    toggled_LTE = torch.ones(LAYERS, TOKENS, EXPERTS, dtype=torch.bool)
    place_LTN = torch.from_numpy(rng.random((LAYERS, TOKENS, 12))).argsort(-1).argsort(-1)
    toggled_LTE[..., 4:] = place_LTN < 4
    layer_P, token_P, rank_P = toggled_LTE.nonzero().T
    expert_P = order_LTE[layer_P, token_P, rank_P]
    weight_E = torch.where(torch.arange(EXPERTS) < 4, 1.0, 3.0).double()
    kl_P = kl_LTE[layer_P, token_P, expert_P]
    toggles = Toggles(
        document_P=document_T[token_P],
        position_P=token_P % 2,
        layer_P=layer_P,
        expert_P=expert_P,
        rank_P=rank_P,
        logits_LTE=logits_LTE,
        hidden_LTH=torch.zeros(LAYERS, TOKENS, 1),
        norm_LTE=torch.ones_like(probability_LTE),
        deviation_LTE=torch.ones_like(probability_LTE),
        kl_P=kl_P,
        loss_change_P=kl_P,
        compensated_kl_P=kl_P,
        compensated_loss_change_P=kl_P,
        sampling_weight_P=weight_E[rank_P],
        rank_weight_E=weight_E,
        noise_L=torch.zeros(LAYERS, dtype=torch.float64),
        rule=ModelRule(4, "softmax"),
        fingerprint="simulated",
    )
    sample = CalibrationSample(
        logits_LTE,
        logits_LTE,
        torch.ones(LAYERS, TOKENS),
        torch.ones(LAYERS, TOKENS),
        torch.ones(LAYERS, EXPERTS),
        hidden_size=8,
        rule=ModelRule(4, "softmax"),
        fingerprint="simulated",
    )
    return sample, toggles, probability_LTE, kl_LTE
