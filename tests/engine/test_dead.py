"""Dead experts add nothing, and come back to life exactly."""

from __future__ import annotations

import pytest
import torch
from families import make
from whole_documents import losses, probes_of

from moe_routing.engine.adapters import find_routers, model_fingerprint, watched
from moe_routing.engine.dead import dead_experts
from moe_routing.engine.toggling import toggling
from moe_routing.errors import InputError

IDS_S = probes_of({20: ()})[0].ids_S


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("Olmoe", num_hidden_layers=3, norm_topk_prob=False)


def router_logits(model, ids_S):
    seen = {}
    with watched(model, lambda layer, _, logits_TE, __: seen.update({layer: logits_TE})):
        losses(model, ids_S)
    return [seen[layer] for layer in sorted(seen)]


def test_a_layer_of_dead_experts_adds_nothing(model):
    before = losses(model, IDS_S)
    with dead_experts(model, [[], range(8), []]):
        dead = losses(model, IDS_S)
        with torch.no_grad():
            hidden_TH, index_TK = torch.randn(3, 32), torch.tensor([[0, 1]] * 3)
            experts = model.model.layers[1].mlp.experts
            assert (experts(hidden_TH, index_TK, torch.ones(3, 2)) == 0).all()
    assert (dead - before).abs().max() > 1e-3
    assert torch.equal(losses(model, IDS_S), before)


def test_the_logits_of_a_dead_layer_are_those_of_the_model(model):
    """Bit for bit; those of later layers are not."""
    stock = router_logits(model, IDS_S)
    with dead_experts(model, [[], range(8), []]):
        dead = router_logits(model, IDS_S)
    assert [torch.equal(a, b) for a, b in zip(stock, dead, strict=True)] == [True, True, False]


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "nemotron_h"])
def test_dead_experts_of_other_families_add_nothing(family):
    """Of experts with biases, transposed ones, and some without a gate: whatever they read."""
    model = make(family)
    routers = find_routers(model)
    before = model_fingerprint(model)
    with dead_experts(model, [[0, 1] for _ in routers]), torch.no_grad():
        for router in routers:
            hidden_TH, weight_TK = torch.randn(3, 32), torch.ones(3, 2)
            dead_TH = router.experts(hidden_TH, torch.tensor([[0, 1]] * 3), weight_TK)
            assert (dead_TH == 0).all()
            alive_TH = router.experts(hidden_TH, torch.tensor([[2, 3]] * 3), weight_TK)
            assert (alive_TH != 0).any(1).all()
    assert model_fingerprint(model) == before


@pytest.mark.parametrize("half", [False, True])
def test_to_toggle_a_dead_expert_is_rounding(make_model, half):
    model = make_model("Olmoe", num_hidden_layers=3, norm_topk_prob=False)
    model = model.bfloat16() if half else model
    probes, dead = probes_of({20: (0, 7, 18), 9: (5,)}), [[0, 3], [1, 2], [4, 7]]
    rank_LPA = {layer: torch.arange(8).expand(4, -1) for layer in range(3)}
    with dead_experts(model, dead), toggling(model, 20, "test") as toggle:
        found = toggle(probes, rank_LPA)
    dead_LPA = torch.stack([
        torch.isin(found.expert_LPA[layer], torch.tensor(dead[layer])) for layer in range(3)
    ])  # fmt: skip
    assert dead_LPA.sum() == 3 * 4 * 2
    assert found.kl_LPA[dead_LPA].max() < 1e-11
    assert found.kl_LPA[~dead_LPA].min() > 1e-8


def test_weights_are_restored_exactly_even_after_an_error(model):
    before = model_fingerprint(model)

    def stopped():
        with dead_experts(model, [[1], [2, 5], [0]]):
            assert model_fingerprint(model) != before
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert model_fingerprint(model) == before


@pytest.mark.parametrize(
    ("dead", "message"),
    [
        ([[0]], "dead experts of 1 layers; allowed: of 3 layers"),
        ([[0], [8], []], "dead expert 8 in layer 1; allowed: 0 to 7"),
    ],
)
def test_experts_that_are_not_there_are_refused(model, dead, message):
    before = model_fingerprint(model)
    with pytest.raises(InputError, match=message), dead_experts(model, dead):
        pass
    assert model_fingerprint(model) == before
    assert len(find_routers(model)) == 3


def test_offloaded_weights_are_refused(make_model, tmp_path):
    import accelerate

    model = accelerate.disk_offload(
        make_model("Olmoe"), tmp_path, execution_device=torch.device("cpu")
    )
    with (
        pytest.raises(InputError, match="dead experts: weights of the model are offloaded"),
        dead_experts(model, [[0], [1]]),
    ):
        pass
