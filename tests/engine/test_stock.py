"""``stock`` is the model's own routing on every family, and weights default to the model's own."""

from __future__ import annotations

import pytest
import torch

from moe_routing import Recorder, routed
from moe_routing.engine.adapters import find_routers
from moe_routing.errors import WeightingWarning
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.types import RouterInputs, Selection
from moe_routing.routing.weighting import Router, weigh

RULES = {
    "OLMoE, raw": ("Olmoe", {"norm_topk_prob": False}, "softmax"),
    "OLMoE, renormalised": ("Olmoe", {"norm_topk_prob": True}, "renormalised"),
    "FlexOlmo": ("FlexOlmo", {"norm_topk_prob": False}, "softmax"),
    "Mixtral": ("Mixtral", {}, "renormalised"),
    "Qwen2-MoE, raw": ("Qwen2Moe", {"norm_topk_prob": False}, "softmax"),
    "Qwen2-MoE, renormalised": ("Qwen2Moe", {"norm_topk_prob": True}, "renormalised"),
    "Qwen3-MoE, raw": ("Qwen3Moe", {"norm_topk_prob": False}, "softmax"),
    "Qwen3-MoE, renormalised": ("Qwen3Moe", {"norm_topk_prob": True}, "renormalised"),
}
IDS = torch.arange(3, 48).view(3, 15)


@pytest.fixture(params=RULES)
def family(request):
    return RULES[request.param]


@pytest.fixture
def own(family, make_model):
    name, settings, _ = family
    return make_model(name, **settings)


@torch.inference_mode()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_stock_is_the_unpatched_model_bit_for_bit(own, implementation, dtype):
    own.to(dtype).set_experts_implementation(implementation)
    unpatched = logits(own)
    with routed(own, "stock", experts_implementation=None):
        assert torch.equal(logits(own), unpatched)


def test_stock_through_the_package_s_experts_is_the_model(own):
    unpatched = logits(own)
    with routed(own, "stock"):
        torch.testing.assert_close(logits(own), unpatched, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_stock_k_is_the_model_loaded_with_that_k(family, own, make_model, k):
    name, settings, _ = family
    other = make_model(name, **settings, num_experts_per_tok=k)
    with routed(own, f"stock_k{k}", experts_implementation=None):
        assert torch.equal(logits(own), logits(other))


@pytest.mark.parametrize("k", [None, 1])
def test_text_is_generated_as_by_the_model(family, own, make_model, k):
    name, settings, _ = family
    other = make_model(name, **settings, **({"num_experts_per_tok": k} if k else {}))
    padded = IDS.clone()
    padded[0, :4] = 0
    options = {
        "attention_mask": (padded != 0).long(), "max_new_tokens": 6, "min_new_tokens": 6,
        "do_sample": False, "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    theirs = other.generate(padded, **options)
    with routed(own, "stock" if k is None else f"stock_k{k}"):
        ours = own.generate(padded, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-4)


def test_the_rule_is_what_a_forward_pass_shows(family, own):
    """The weights that the model's router returns are those of the rule, in the stated dtype."""
    _, _, weighting = family
    for dtype in (torch.float32, torch.bfloat16):
        own.to(dtype)
        for router in find_routers(own):
            assert router.rule == ModelRule(2, weighting)
            hidden_TH = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
            with torch.inference_mode():
                logits_TE, weight_TK, index_TK = router.module(hidden_TH)
            probability_TE = logits_TE.float().softmax(-1)
            expected_TK = weigh("model", probability_TE, Selection.fixed(index_TK), router.rule)
            assert weight_TK.dtype == dtype or not router.behaviour.rounds
            torch.testing.assert_close(weight_TK, expected_TK.to(weight_TK.dtype), rtol=0, atol=0)


def test_a_rule_that_keeps_the_model_s_choice_keeps_its_output(own):
    """Without a weighting in the id, the weights are the model's."""
    recorder = Recorder()
    unpatched = logits(own)
    with routed(own, "minp_k2_t000001", recorder=recorder):
        found = logits(own)
    assert recorder.statistics().mean_experts() == 2
    torch.testing.assert_close(found, unpatched, rtol=0, atol=1e-5)


def test_other_weights_than_the_model_s_are_warned_of(family, own):
    _, _, weighting = family
    other = {"softmax": "normalized_k2", "renormalised": "regular_k2"}[weighting]
    with (
        pytest.warns(WeightingWarning, match=f"'{other}' has .* trained with {weighting} ones"),
        routed(own, other),
    ):
        pass


@pytest.mark.filterwarnings("error::moe_routing.errors.WeightingWarning")
def test_the_model_s_own_weights_are_not_warned_of(family, own):
    _, _, weighting = family
    same = {"softmax": "regular_k2", "renormalised": "normalized_k2"}[weighting]
    for strategy in ("stock", "stock_k1", "minp_k2_t010", same):
        with routed(own, strategy):
            pass


def test_what_ranks_experts_does_not_enter_their_weights():
    """A bias moves the choice; the weights are the probabilities of the chosen, as before."""
    logits_TE = torch.randn(7, 8, generator=torch.Generator().manual_seed(2))
    score_TE = logits_TE + torch.tensor([5.0, 4.0, 0, 0, 0, 0, 0, 0])
    inputs = RouterInputs(0, logits_TE, score_TE=score_TE)
    for strategy in ("stock_k2", "minp_k2_t001"):
        resolved = parse_strategy(strategy).resolved(ModelRule(2, "softmax"))
        router = Router(resolved.selector(None, 8), "model", ModelRule(2, "softmax"))
        routing = router(inputs)
        index_TK = routing.selection.index_TK
        assert (score_TE.topk(2).indices == index_TK).all()
        assert (logits_TE.topk(2).indices != index_TK).any()
        assert torch.equal(routing.weight_TK, logits_TE.softmax(-1).gather(1, index_TK))
        assert routing.score_TE is score_TE


def test_the_own_weight_of_every_expert_is_on_the_scale_of_the_model():
    """Renormalised, an expert that the model does not choose gets what it would have got."""
    logits_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    probability_TE = logits_TE.softmax(-1)
    raw, renormalised = (
        RouterInputs(0, logits_TE, rule=ModelRule(2, kind)).own_weight_TE
        for kind in ("softmax", "renormalised")
    )
    assert torch.equal(raw, probability_TE)
    torch.testing.assert_close(renormalised, probability_TE / probability_TE[:, :2].sum())
    torch.testing.assert_close(renormalised[:, :2].sum(), torch.tensor(1.0))


def test_top_p_counts_the_model_s_own_weights():
    """Where the top two have all the weight, no mass below 1 needs more than two."""
    logits_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(3))
    for kind, most in (("softmax", 8), ("renormalised", 2)):
        rule = ModelRule(2, kind)
        select = parse_strategy("topp_k8_p099").selector(None, 8)
        inputs = RouterInputs(0, logits_TE, rule=rule)
        count_T = select(inputs, logits_TE.softmax(-1)).count_T
        assert int(count_T.max()) == most
