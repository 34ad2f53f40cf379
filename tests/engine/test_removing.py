"""Experts of a token that are removed together, against whole forward passes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields
from functools import partial

import pytest
import torch
from whole_documents import chosen, prediction, probes_of, without

from moe_routing.engine import branches
from moe_routing.engine.adapters import find_routers
from moe_routing.engine.packable import Packable
from moe_routing.engine.patching import patched_forward, sole_replacement
from moe_routing.engine.removing import Removed, removing
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError

FAMILIES = {
    "Olmoe": {"num_hidden_layers": 3, "norm_topk_prob": False, "num_experts_per_tok": 3},
    "Mixtral": {"num_experts_per_tok": 3},  # renormalises
    "Qwen3Moe": {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": False},
}
PROBES = probes_of({20: (0, 7, 18), 9: (5,)})


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, make_model):
    return make_model(request.param, **FAMILIES[request.param])


def random_sets(model, *shape, share=0.5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    layers, experts = len(find_routers(model)), find_routers(model)[0].num_experts
    return torch.rand((layers, *shape, experts), generator=rng) < share


def remove(model, probes, alone, together):
    with removing(model, 20, "test") as remover:
        return remover(probes, alone, together)


def test_sets_of_experts_are_removed_as_in_whole_passes(model):
    alone_LPE, removed_LPBE = random_sets(model, 4), random_sets(model, 4, 3, seed=1)
    found = remove(model, PROBES, alone_LPE, removed_LPBE)
    probed = [(probe, position) for probe in PROBES for position in probe.positions]
    every = range(len(find_routers(model)))
    for index, (probe, position) in enumerate(probed):
        stock_V = prediction(model, probe.ids_S, position)
        target = int(probe.ids_S[position + 1])
        rows = [
            (found.alone_kl_LP[layer, index], found.alone_change_LP[layer, index],
             alone_LPE[:, index], [layer])
            for layer in every
        ] + [
            (found.kl_PB[index, branch], found.change_PB[index, branch],
             removed_LPBE[:, index, branch], every)
            for branch in range(3)
        ]  # fmt: skip
        for kl, change, removed_LE, layers in rows:
            slow_V = without(model, probe.ids_S, position, removed_LE, layers)
            slow = float((stock_V.exp() * (stock_V - slow_V)).sum())
            assert float(kl) == pytest.approx(slow, rel=0.01, abs=1e-7)
            assert float(change) == pytest.approx(float((stock_V - slow_V)[target]), abs=1e-5)
    assert found.kl_PB.max() > 0.01


def test_plain_passes_remove_the_same_as_packed_batches(model, monkeypatch):
    sets = random_sets(model, 4), random_sets(model, 4, 3, seed=1)
    packed = remove(model, PROBES, *sets)
    monkeypatch.setattr(branches, "packable_attention", lambda _: Packable(0, "test"))
    for rows in (branches.BATCH_ROWS, 60, 1):  # all copies at once, few, and one by one
        monkeypatch.setattr(branches, "BATCH_ROWS", rows)
        plain = remove(model, PROBES, *sets)
        for field in fields(Removed):
            expected, found = getattr(packed, field.name), getattr(plain, field.name)
            assert torch.allclose(expected, found, rtol=1e-3, atol=1e-5), field.name
    assert packed.kl_PB.min() > 1e-3


def test_later_routers_are_not_asked(make_model):
    """They would choose others, and the prediction would be another."""
    model = make_model("Olmoe", num_hidden_layers=3, norm_topk_prob=False, initializer_range=1.0)
    ids_S = probes_of({20: ()})[0].ids_S
    removed_LE = random_sets(model, share=0.6)

    def masked(own_LK, others):
        def patch(layer, inner):
            def forward(hidden_TH):
                logits_TE, weight_TK, index_TK = inner(hidden_TH)
                weight_TK[-1] *= ~removed_LE[layer, index_TK[-1]]
                others.append(set(index_TK[-1].tolist()) != set(own_LK[layer]))
                return logits_TE, weight_TK, index_TK

            return forward

        return patch

    moved = []
    for position in range(19):
        others: list[bool] = []
        patch = masked(chosen(model, ids_S, position), others)
        with ExitStack() as stack:
            for router in find_routers(model):
                make = partial(patch, router.layer)
                stack.enter_context(patched_forward(router.module, make))
            asked_V = prediction(model, ids_S, position)
        if any(others):
            kept_V = without(model, ids_S, position, removed_LE, range(3))
            moved.append(float((asked_V - kept_V).abs().max()))
    assert len(moved) > 5
    assert max(moved) > 0.1


def test_nothing_removed_is_rounding_and_everything_removed_is_not(model):
    experts = find_routers(model)[0].num_experts
    nothing, everything = (
        torch.full((len(find_routers(model)), 4, 1, experts), flag) for flag in (False, True)
    )
    still = remove(model, PROBES, nothing[:, :, 0], nothing)
    gone = remove(model, PROBES, everything[:, :, 0], everything)
    assert max(still.kl_PB.max(), still.alone_kl_LP.max()) < 1e-10
    assert min(gone.kl_PB.min(), gone.alone_kl_LP.min()) > 1e-7


def test_all_layers_at_once_may_have_no_branch(model):
    alone_LPE = random_sets(model, 4)
    found = remove(model, PROBES, alone_LPE, random_sets(model, 4, 0))
    both = remove(model, PROBES, alone_LPE, random_sets(model, 4, 2))
    assert found.kl_PB.shape == (4, 0)
    assert torch.allclose(found.alone_kl_LP, both.alone_kl_LP, rtol=1e-3, atol=1e-10)


def test_a_routed_model_is_refused_and_the_model_restored(model):
    alone_LPE, removed_LPBE = random_sets(model, 4), random_sets(model, 4, 1)
    with (
        routed(model, "regular_k2"),
        pytest.raises(InputError, match="the model is routed by 'regular_k2' already"),
    ):
        remove(model, PROBES, alone_LPE, removed_LPBE)
    assert sole_replacement(model) is None
    assert all("forward" not in vars(module) for module in model.modules())
