"""The slow twin of removals: whole documents, computed again."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_routing.engine.adapters import find_routers
from moe_routing.engine.branches import Probe
from moe_routing.engine.patching import patched_forward


def losses(model, ids_S):
    with torch.inference_mode():
        logits_SV = model(ids_S[None, :-1], use_cache=False).logits[0]
    return F.cross_entropy(logits_SV.double(), ids_S[1:], reduction="none")


def slow_change(model, ids_S, position, layer, expert):
    """Recompute a whole document without one expert, and compare all its losses."""

    def without(inner):
        def forward(hidden_TH):
            logits_TE, weight_TK, index_TK = inner(hidden_TH)
            weight_TK[position] *= index_TK[position] != expert
            return logits_TE, weight_TK, index_TK

        return forward

    before = losses(model, ids_S)
    with patched_forward(find_routers(model)[layer].module, without):
        return losses(model, ids_S) - before


def probes_of(positions):
    """Return documents of random tokens: from their length to the positions that are probed."""
    return [
        Probe(number, torch.randint(3, 64, (length,), generator=_generator(number)), probed)
        for number, (length, probed) in enumerate(positions.items())
    ]


def _generator(seed):
    return torch.Generator().manual_seed(seed)
