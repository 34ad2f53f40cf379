"""The slow twins of removals: whole documents, computed again."""

from __future__ import annotations

from contextlib import ExitStack

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
        def forward(*args):
            logits_TE, weight_TK, index_TK = inner(*args)
            weight_TK[position] *= index_TK[position] != expert
            return logits_TE, weight_TK, index_TK

        return forward

    before = losses(model, ids_S)
    with patched_forward(find_routers(model)[layer].module, without):
        return losses(model, ids_S) - before


def prediction(model, ids_S, position):
    with torch.inference_mode():
        logits_V = model(ids_S[None, : position + 1], use_cache=False).logits[0, -1]
    return logits_V.double().log_softmax(-1)


def chosen(model, ids_S, position):
    """Return the experts that the model chooses at a position, by layer."""
    seen, routers = {}, find_routers(model)
    hooks = [
        router.module.register_forward_hook(
            lambda _, __, out, layer=router.layer: seen.update({layer: out[2][position].tolist()})
        )
        for router in routers
    ]
    prediction(model, ids_S, position)
    for hook in hooks:
        hook.remove()
    return [seen[router.layer] for router in routers]


def without(model, ids_S, position, removed, layers):
    """Predict with experts of the last token removed: its weights are worked out by hand.

    ``removed`` is a bool, (layers, experts).
    """
    own = chosen(model, ids_S, position)

    def forced(router):
        def patch(inner):
            def forward(hidden_TH):
                logits_TE, weight_TK, index_TK = inner(hidden_TH)
                probability_E = logits_TE[-1].softmax(-1)
                scale = 1.0
                if router.rule.weighting == "renormalised":
                    scale = 1 / probability_E[index_TK[-1]].sum()
                for slot, expert in enumerate(own[router.layer]):
                    index_TK[-1, slot] = expert
                    kept = not removed[router.layer, expert]
                    weight_TK[-1, slot] = probability_E[expert] * scale if kept else 0.0
                return logits_TE, weight_TK, index_TK

            return forward

        return patch

    with ExitStack() as stack:
        for router in find_routers(model):
            if router.layer in layers:
                stack.enter_context(patched_forward(router.module, forced(router)))
        return prediction(model, ids_S, position)


def probes_of(positions):
    """Return documents of random tokens: from their length to the positions that are probed."""
    return [
        Probe(number, torch.randint(3, 64, (length,), generator=_generator(number)), probed)
        for number, (length, probed) in enumerate(positions.items())
    ]


def _generator(seed):
    return torch.Generator().manual_seed(seed)
