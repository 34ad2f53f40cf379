"""Scores and compensation inside a routed model, against a loop over tokens and experts."""

from __future__ import annotations

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from shared import with_budgets

from moe_routing import Recorder, routed
from moe_routing.engine.adapters import (
    find_experts,
    find_routers,
    model_fingerprint,
    router_fingerprint,
)
from moe_routing.engine.requests import TokenRequest
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.sample import CalibrationSample

FAMILIES = {
    "OLMoE": ("Olmoe", {"norm_topk_prob": False}),
    "Mixtral": ("Mixtral", {}),
    "Qwen3-MoE": ("Qwen3Moe", {"norm_topk_prob": True}),
    "Qwen2-MoE, shared expert": ("Qwen2Moe", {"norm_topk_prob": False}),
}
IDS = torch.arange(3, 48).view(3, 15)
TOP_K = 3
NAMES = [
    "stock_k1_compensated", "stock_k2_norm_compensated", "stock_k2_norm", "stock_k2_exact-norm",
    "stock_k2_exact-norm_compensated", "stock_k2_mean-norm_own_compensated_scaled",
    "absolute_k3_b15_norm_compensated", "absolute_k4_b2_norm_all_compensated", "absolute_k3_b035",
]  # fmt: skip


BUDGETED = [
    *(name for name in NAMES if name.startswith("absolute")), "absolute_k3_b035_compensated",
    "absolute_k3_b1_compensated",
]  # fmt: skip


@pytest.fixture(params=FAMILIES)
def own(request, make_model):
    family, settings = FAMILIES[request.param]
    return make_model(family, **settings, num_experts_per_tok=TOP_K)


def calibration_for(model, tokens=200):
    """A calibration with made-up outputs that belongs to the model."""
    generator = torch.Generator().manual_seed(5)
    routers = find_routers(model)
    layers, (experts, hidden) = len(routers), routers[0].module.weight.shape

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    ids = torch.randint(3, 64, (1, tokens), generator=generator)
    logits, states = {}, {}
    hooks = []
    for router in routers:

        def see(_, inputs, output, layer=router.layer):
            states[layer], logits[layer] = inputs[0].reshape(-1, hidden), output[0]

        hooks.append(router.module.register_forward_hook(see))
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    logits_LTE = torch.stack([logits[layer].float() for layer in range(layers)]).clone()
    state_LTH = torch.stack([states[layer].float() for layer in range(layers)]).clone()
    rule = routers[0].rule
    norm_LT = state_LTH.norm(dim=-1)
    sample = CalibrationSample(
        logits_LTE, logits_LTE, norm_LT, norm_LT, torch.ones(layers, experts), hidden, rule,
        router_fingerprint(model),
    )  # fmt: skip
    slope_LEH = 0.2 * normal(layers, experts, hidden)
    deviation_slope_LEH = 0.2 * normal(layers, experts, hidden)
    offset_LE, deviation_offset_LE = normal(layers, experts), normal(layers, experts)
    one_L = torch.ones(layers, dtype=torch.float64)
    outputs = ExpertOutputs(
        mean_LEH=0.3 * normal(layers, experts, hidden),
        log_mean_norm_LE=normal(layers, experts),
        log_mean_deviation_LE=normal(layers, experts),
        slope_LEH=slope_LEH,
        offset_LE=offset_LE,
        deviation_slope_LEH=deviation_slope_LEH,
        deviation_offset_LE=deviation_offset_LE,
        r2_L=one_L,
        deviation_r2_L=one_L,
        explained_L=one_L,
        sample_log_norm_LTE=state_LTH @ slope_LEH.mT + offset_LE[:, None],
        sample_log_deviation_LTE=state_LTH @ deviation_slope_LEH.mT + deviation_offset_LE[:, None],
        rule=rule,
        fingerprint=model_fingerprint(model),
    )
    scales = {name: 1.1 for name in NAMES if name.endswith("scaled")}
    return with_budgets(Calibration(sample, {}, None, outputs, scales), *BUDGETED)


@torch.inference_mode()
def logits_of(model, ids=IDS):
    return model(ids, use_cache=False).logits


def expert_output(module, hidden_H, expert):
    """One expert on one token; the stored weights map rows, not columns."""
    gate_up = module.gate_up_proj[expert]
    gate, up = (gate_up @ hidden_H).chunk(2)
    return module.down_proj[expert] @ (module.act_fn(gate) * up)


def slow_forward(experts, router, name, calibration):
    """The experts of a layer under a strategy, by a loop over tokens and experts."""
    parts = name.split("_")
    outputs, layer, rule = calibration.outputs, router.layer, router.rule
    outputs = dataclasses.replace(
        outputs, **{name: getattr(outputs, name).double() for name in outputs.TENSORS}
    )
    compensated, scale = "compensated" in parts, calibration.scales.get(name, 1.0)
    score = next((p for p in ("mean-norm", "exact-norm", "norm") if p in parts), "probability")
    threshold = None
    if parts[0] == "absolute":
        from moe_routing.routing.strategies import parse_strategy

        threshold = parse_strategy(name).fitted(calibration).threshold_of(calibration)
    own_only = "own" in parts or (parts[0] == "absolute" and "all" not in parts)
    most = int(parts[1][1:])

    def weighted(hidden_H):
        logits_E = router.module.weight @ hidden_H
        probability_E = logits_E.softmax(-1)
        own = probability_E.topk(rule.top_k).indices.tolist()
        mass = probability_E[own].sum() if rule.weighting == "renormalised" else 1.0
        value_E = []
        for e in range(len(probability_E)):
            output_H = expert_output(experts, hidden_H, e)
            part = "deviation_" if compensated else ""
            mean_H = outputs.mean_LEH[layer, e] if compensated else 0.0
            table = outputs.log_mean_deviation_LE if compensated else outputs.log_mean_norm_LE
            slope_H = getattr(outputs, f"{part}slope_LEH")[layer, e]
            size = {
                "probability": 1.0,
                "mean-norm": table[layer, e].exp(),
                "norm": (slope_H @ hidden_H + getattr(outputs, f"{part}offset_LE")[layer, e]).exp(),
                "exact-norm": (output_H - mean_H).norm(),
            }[score]
            value_E.append(float(probability_E[e] / mass * size))
        among = own if own_only else range(len(value_E))
        kept = sorted(among, key=lambda e: -value_E[e])[:most]
        if threshold is not None:
            kept = [e for e in kept if value_E[e] >= threshold]
        total_H = torch.zeros_like(hidden_H)
        kept_mass = probability_E[kept].sum()
        for e in kept:
            divisor = mass if compensated or rule.weighting == "softmax" else kept_mass
            total_H += probability_E[e] / divisor * expert_output(experts, hidden_H, e)
        for e in set(own) - set(kept) if compensated else ():
            total_H += probability_E[e] / mass * outputs.mean_LEH[layer, e]
        return scale * total_H

    return lambda hidden_TH: torch.stack([weighted(hidden_H) for hidden_H in hidden_TH])


@torch.inference_mode()
def slow_logits(model, name, calibration, ids=IDS):
    twin = copy.deepcopy(model)
    for experts, router in zip(find_experts(twin), find_routers(twin), strict=True):
        slow = slow_forward(experts, router, name, calibration)
        experts.forward = lambda hidden_TH, index_TK, weight_TK, slow=slow: slow(hidden_TH)
    return twin(ids, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_a_routed_model_equals_a_loop_over_tokens_and_experts(own, name):
    own.double().set_experts_implementation("eager")
    calibration = calibration_for(own)
    with routed(own, name, calibration=calibration):
        ours = logits_of(own)
    torch.testing.assert_close(ours, slow_logits(own, name, calibration), rtol=0, atol=1e-5)
    assert (ours - logits_of(own)).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", None])
def test_every_experts_implementation_agrees(own, implementation):
    calibration = calibration_for(own)
    for name in ("stock_k2_norm_compensated", "absolute_k3_b035_compensated", "absolute_k3_t9"):
        with routed(own, name, calibration=calibration):
            ours = logits_of(own)
        with routed(own, name, calibration=calibration, experts_implementation=implementation):
            theirs = logits_of(own)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_nothing_dropped_is_the_model(own):
    calibration = calibration_for(own)
    with routed(own, f"stock_k{TOP_K}_compensated", calibration=calibration):
        ours = logits_of(own)
    torch.testing.assert_close(ours, logits_of(own), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored_exactly(own, fails):
    calibration = calibration_for(own)
    state = [dict(vars(module)) for module in own.modules()]
    before = logits_of(own)
    try:
        with routed(own, "stock_k1_compensated", calibration=calibration):
            inside = logits_of(own)
            if fails:
                raise KeyError("a user's error")
    except KeyError:
        assert fails
    assert not torch.equal(before, inside)
    assert [dict(vars(module)) for module in own.modules()] == state
    assert torch.equal(logits_of(own), before)


def test_a_copy_made_inside_is_a_stock_model(own):
    calibration = calibration_for(own)
    before = logits_of(own)
    with routed(own, "stock_k1_compensated", calibration=calibration):
        twin = copy.deepcopy(own)
        assert torch.equal(logits_of(twin), before)
    assert torch.equal(logits_of(twin), before)


def test_threads_do_not_mix_their_dropped_weights(own):
    calibration = calibration_for(own)
    batches = [torch.randint(3, 64, (1 + n % 3, 5 + n)) for n in range(24)]
    with routed(own, "stock_k1_norm_compensated", calibration=calibration):
        alone = [logits_of(own, ids) for ids in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda ids: logits_of(own, ids), batches))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_left_padded_text_is_generated_like_text_alone(own):
    calibration = calibration_for(own)
    padded = IDS.clone()
    padded[0, :4] = 0
    options = {
        "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_scores": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    for name in ("stock_k2_norm_compensated", "absolute_k3_b1_compensated"):
        with routed(own, name, calibration=calibration):
            mask = (padded != 0).long()
            together = own.generate(padded, attention_mask=mask, **options)
            alone = own.generate(padded[:1, 4:], **options)
        assert torch.equal(together.sequences[0, 4:], alone.sequences[0])
        for one, other in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["stock_k2_norm_compensated", "absolute_k3_b15_norm_compensated"])
def test_packed_scoring_equals_plain_passes(own, tokenizer, name):
    own.double().set_experts_implementation("eager")
    calibration = calibration_for(own)
    requests = [
        TokenRequest(row[: 9 + n].tolist(), row[5 + n : 10 + n].tolist())
        for n, row in enumerate(IDS)
    ]
    scores = []
    for padded in (False, True):
        scorer = Scorer(own, tokenizer, token_budget=64, padded_attention=padded)
        with routed(own, name, calibration=calibration):
            scores.append(scorer.score_tokens(requests, [[0, 1], [2]]))
    with routed(own, name, calibration=calibration):
        for n, request in enumerate(requests):
            log_TV = logits_of(own, torch.tensor([request.input_ids]))[0].log_softmax(-1)
            targets = torch.tensor(request.target_ids)
            expected = float(log_TV[-len(targets) :].gather(1, targets[:, None]).sum())
            for found in scores:
                assert found[n].log_likelihood == pytest.approx(expected, rel=1e-6)


def test_padding_gets_no_means(own):
    from moe_routing.engine.context import ForwardContext, forward_context

    calibration = calibration_for(own)
    router, experts = find_routers(own)[0], find_experts(own)[0]
    hidden_TH = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    mask_T = torch.tensor([True, False, True, False])
    with (
        torch.inference_mode(),
        routed(own, "stock_k1_compensated", calibration=calibration),
        forward_context(ForwardContext(mask_T=mask_T)),
    ):
        _, weight_TK, index_TK = router.module(hidden_TH)
        output_TH = experts(hidden_TH, index_TK, weight_TK)
    assert (output_TH[~mask_T] == 0).all()
    assert (output_TH[mask_T].abs().amax(1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(own, dtype):
    own.to(dtype)
    calibration = calibration_for(own)
    with routed(own, "stock_k2_norm_compensated", calibration=calibration):
        logits = logits_of(own)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_a_recorder_sees_layers_without_experts(own):
    calibration = calibration_for(own)
    recorder = Recorder()
    with routed(own, "absolute_k3_b035", calibration=calibration, recorder=recorder):
        logits_of(own)
    statistics = recorder.statistics()
    assert statistics.count_histogram_LC[:, 0].sum() > 0
    assert statistics.mean_experts() < 1
    assert (statistics.floor_binds_L == 0).all()
    assert (statistics.empty_L > 0).any()


def test_what_does_not_fit_is_refused(own):
    calibration = calibration_for(own)
    weighting = find_routers(own)[0].rule.weighting
    other = {"softmax": "normalized", "renormalised": "regular"}[weighting]
    foreign = dataclasses.replace(calibration.outputs, fingerprint="another")
    certificate = SimpleNamespace(threshold=0.1, fingerprint="another")
    certified = "certified_k3_m001_probability"
    cases = {
        f"{other}_k2_compensated": (calibration, f"has .* weights; allowed with .*{weighting}"),
        "stock_k2_norm": (None, "needs a calibration of this model; none given"),
        "stock_k2_compensated": (
            dataclasses.replace(calibration, outputs=None), "needs the mean outputs of the experts",
        ),
        "stock_k1_norm": (
            dataclasses.replace(calibration, outputs=foreign),
            "the calibration computed expert outputs of a model with other weights",
        ),
        "stock_k2_scaled": (calibration, "its scale is not fitted"),
        certified: (
            dataclasses.replace(calibration, certificates={certified: certificate}),
            "the calibration certified a strategy of a model with other weights",
        ),
    }  # fmt: skip
    for name, (given, line) in cases.items():
        with pytest.raises(InputError, match=line), routed(own, name, calibration=given):
            pass


def test_experts_that_cannot_be_changed_are_refused(own, monkeypatch):
    calibration = calibration_for(own)
    monkeypatch.setattr("moe_routing.engine.routed.find_experts", lambda _: [])
    with (
        pytest.raises(
            InputError, match=r"2 routers and 0 experts modules .* without 'compensated'"
        ),
        routed(own, "stock_k2_compensated", calibration=calibration, experts_implementation=None),
    ):
        pass
