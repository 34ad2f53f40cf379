"""All experts at once give what the experts module gives when it is routed to one of them."""

from __future__ import annotations

import pytest
import torch

from moe_routing.engine.adapters import find_experts
from moe_routing.engine.all_experts import CHUNK, DenseExperts
from moe_routing.errors import InputError

FAMILIES = ("Olmoe", "FlexOlmo", "Mixtral", "Qwen2Moe", "Qwen3Moe")


@pytest.fixture
def hidden():
    return torch.randn(CHUNK + 7, 32, generator=torch.Generator().manual_seed(0))


def by_routing(module, hidden_TH):
    """Route all tokens to one expert after the other, with weight 1."""
    ones_T1 = torch.ones(len(hidden_TH), 1)
    outputs = [
        module(hidden_TH, torch.full((len(hidden_TH), 1), expert), ones_T1)
        for expert in range(module.num_experts)
    ]
    return torch.stack(outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_one_expert_after_the_other(make_model, hidden, family):
    model = make_model(family)
    model.set_experts_implementation("eager")
    module = find_experts(model)[1]
    slow_ETH = by_routing(module, hidden)
    experts = DenseExperts.load(module)
    found = list(experts.outputs(hidden))
    assert [part.shape[1] for part in found] == [CHUNK, 7]
    torch.testing.assert_close(torch.cat(found, 1), slow_ETH, rtol=1e-5, atol=1e-6)
    mean_EH = experts.mean_output(hidden)
    torch.testing.assert_close(mean_EH, slow_ETH.mean(1), rtol=1e-5, atol=1e-6)
    norm_TE, deviation_TE = experts.norms(hidden, mean_EH)
    slow_deviation_ETH = slow_ETH - slow_ETH.mean(1, keepdim=True)
    torch.testing.assert_close(norm_TE, slow_ETH.norm(dim=2).T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(deviation_TE, slow_deviation_ETH.norm(dim=2).T, rtol=1e-5, atol=1e-6)


def test_half_precision_experts_run_in_single_precision(make_model, hidden):
    model = make_model("Olmoe").bfloat16()
    module = find_experts(model)[0]
    coarse_TH = hidden.bfloat16()
    (first_ETH, *_) = DenseExperts.load(module).outputs(coarse_TH)
    assert module.down_proj.dtype == torch.bfloat16
    wide = find_experts(model.float())[0]
    wide_ETH = torch.cat(list(DenseExperts.load(wide).outputs(coarse_TH.float())), 1)
    torch.testing.assert_close(first_ETH, wide_ETH[:, :CHUNK])


def test_experts_with_a_norm_are_refused(make_model):
    module = find_experts(make_model("Olmoe"))[0]
    module.has_post_expert_norm = True
    with pytest.raises(InputError, match="OlmoeExperts: experts that cannot be computed one by"):
        DenseExperts.load(module)
