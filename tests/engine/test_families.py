"""Every family routes as its own model does; the table in the documentation is made of this."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, REFUSED, SIZES, build, make

from moe_routing import Recorder, routed
from moe_routing.engine.adapters import find_experts, find_routers
from moe_routing.engine.packable import packable
from moe_routing.engine.requests import TokenRequest
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError
from moe_routing.evaluation.calibrate import sample_router_logits

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
IDS = torch.arange(3, 63).view(4, 15)
CLOSE = {"rtol": 1e-4, "atol": 5e-5}


@torch.inference_mode()
def logits_of(model):
    return model(IDS, use_cache=False).logits


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def test_stock_is_the_model_and_another_k_is_its_own_setting(name):
    model = make(name)
    expected = logits_of(model)
    with routed(model, "stock", recorder=(recorder := Recorder())):
        torch.testing.assert_close(logits_of(model), expected, **CLOSE)
    assert torch.equal(logits_of(model), expected)
    seen = recorder.statistics()
    assert seen.mean_experts_L().tolist() == [2.0] * len(find_routers(model))
    with routed(model, "stock_k3"):
        three = logits_of(model)
    torch.testing.assert_close(three, logits_of(make(name, k=3)), **CLOSE)
    assert (three - expected).abs().max() > 0.1


def test_rules_of_the_layers(name):
    """Weights by hand, from the logits of the model's own router and of the rule that was found."""
    model = make(name)
    seen = {}

    def keep(router):
        def hook(_, inputs, output):
            seen[router.layer] = (inputs, output)

        return hook

    routers = find_routers(model)
    for router in routers:
        router.module.register_forward_hook(keep(router))
    logits_of(model)
    for router in routers:
        (_, *args), (raw_TE, weight_TK, index_TK) = seen[router.layer]
        behaviour, rule = router.behaviour, router.rule
        choice_TE = behaviour.choice(router.module, raw_TE, *args)
        assert rule.biased == (choice_TE is not None)
        probability_TE = behaviour.logits(raw_TE).softmax(-1)
        ranked_TE = probability_TE if choice_TE is None else choice_TE
        for token in range(len(raw_TE)):
            best = ranked_TE[token].argsort(descending=True)[:2].tolist()
            assert sorted(index_TK[token].tolist()) == sorted(best)
            own_K = probability_TE[token, index_TK[token]]
            if rule.weighting == "renormalised":
                own_K = own_K / own_K.sum()
            factor_E = getattr(router.module, "per_expert_scale", torch.ones(router.num_experts))
            torch.testing.assert_close(
                weight_TK[token].float(),
                rule.factor * own_K * factor_E[index_TK[token]],
                rtol=1e-4,
                atol=1e-6,
            )


@pytest.mark.parametrize("strategy", ["topp_k4_p06", "minp_k4_t04", "absolute_k2_t03"])
def test_other_strategies_change_the_model(name, strategy):
    model = make(name)
    expected = logits_of(model)
    with routed(model, strategy, recorder=(recorder := Recorder())):
        found = logits_of(model)
    assert found.isfinite().all()
    assert (found - expected).abs().max() > 1e-3
    assert 0 < recorder.statistics().mean_experts() < 4
    # Of our experts and of the model's own, where a padded slot repeats an expert.
    with routed(model, strategy, experts_implementation=None):
        torch.testing.assert_close(logits_of(model), found, rtol=1e-3, atol=2e-4)


def test_scores_are_those_of_plain_passes(name, tokenizer):
    """Packed or not: two requests with a common context, one longer than the window of gpt-oss."""
    model = make(name)
    rows = [list(range(3, 43)), [*range(3, 23), 60, 61], [9, 8, 7]]
    requests = [TokenRequest(row[:-1], row[-2:]) for row in rows]
    scores = Scorer(model, tokenizer).score_tokens(requests, [[0, 1], [2]])
    for row, score in zip(rows, scores, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([row[:-1]]), use_cache=False).logits[0, -2:].double()
        likelihood = logits.log_softmax(-1).gather(1, torch.tensor(row[-2:])[:, None]).sum()
        assert score.log_likelihood == pytest.approx(float(likelihood), abs=2e-4)


def test_layers_are_counted(name):
    """Layers without experts have no number."""
    model = make(name)
    routers = find_routers(model)
    assert [router.layer for router in routers] == list(range(len(routers)))
    assert [router.num_experts for router in routers] == [8] * len(routers)
    assert find_experts(model) == [router.experts for router in routers]
    dense = int(FAMILIES[name].settings.get("num_dense_layers", 0))
    dense += int(FAMILIES[name].settings.get("first_k_dense_replace", 0))
    if name not in ("ernie4_5_moe", "jamba", "nemotron_h"):  # other settings say it
        assert len(routers) == SIZES["num_hidden_layers"] - dense


def test_layers_with_different_numbers_of_experts(tokenizer):
    """As of a pruned model: each layer is routed, and counted, by its own number."""
    model, small = make("olmoe"), make("olmoe", num_experts=3, num_local_experts=3)
    model.model.layers[1].mlp = small.model.layers[1].mlp
    expected = logits_of(model)
    assert [router.num_experts for router in find_routers(model)] == [8, 3, 8]
    with routed(model, "stock", recorder=(recorder := Recorder())):
        torch.testing.assert_close(logits_of(model), expected, **CLOSE)
    seen = recorder.statistics()
    assert seen.count_histogram_LC.shape == (3, 9)
    assert seen.load_LE.shape == (3, 8)
    assert seen.load_LE[1, 3:].sum() == 0
    assert seen.load_LE.sum(1).tolist() == [120, 120, 120]
    with routed(model, "topp_k3_p06"):
        assert logits_of(model).isfinite().all()
    with pytest.raises(InputError, match="may select 4 experts; allowed: at most the model's 3"):
        routed(model, "stock_k4").__enter__()
    with pytest.raises(InputError, match="layers have 3 to 8 experts; allowed: the same number"):
        sample_router_logits(
            model, tokenizer, ["text " * 99], tokens=16, window=16, rng=np.random.default_rng(0)
        )


def rows():
    """Return the rows of the table, by what one forward pass of each tiny model shows."""
    for name, tiny in FAMILIES.items():
        model = make(name)
        behaviour = find_routers(model)[0].behaviour
        rule = behaviour.rule
        weights = "softmax" if behaviour.score == "given" else behaviour.score
        weights += ", renormalised" if rule.weighting == "renormalised" else ""
        weights += ", a factor of each expert" if behaviour.scale else ""
        selection = "score"
        if behaviour.bias:
            selection += " + bias"
        if behaviour.grouping:
            selection += ", best groups of experts"
        packed = "yes" if packable(model).longest else "no"
        yield f"| `{name}` | `{tiny.example}` | {weights} | {selection} | {packed} |"


HEAD = """# Model families

A router is recognised by what one forward pass of it shows, whatever its class is called. So a
model type that is not listed may work too; one that does not is refused in one line that names the
model type and what is missing, before any weights are downloaded. The first table holds the model
types of transformers that the tests route: on a tiny random model, `stock` gives the logits of the
model itself, and `stock_k3` those of the model with its own setting changed to 3.
`tests/engine/test_families.py` writes this page.

Weights are the router's scores, softmax or sigmoid of its logits. Experts are selected by the same
scores, unless a bias that balances the load, or groups of experts, have a part in it. Models that
are not packed are scored by plain forward passes, which is slower. Their experts are toggled by
plain forward passes too, which takes many times longer than in packed batches. Where weights have a
factor of each expert, what computes experts one by one is refused: a study, `compensated`, scores
other than the probability, and calibration by toggled experts.

| model type | a checkpoint | weights | selected by | packed |
|---|---|---|---|---|
"""


REST = """
## Quantised checkpoints and adapters

Experts of a quantised checkpoint are computed by this package where transformers gives them back
their values (FP8 and MXFP4 without a GPU that computes in them, compressed-tensors), and where the
library leaves them as they are (torchao and quanto, which change linear layers). The tests compare
such models with those of the values. Where the weights of experts stay codes, the model's own code
runs them: a token with fewer experts than slots repeats its first expert with weight 0. Weights
that cannot be run, on the device or in the dtype, are refused when they are loaded.

Models with a LoRA adapter of `peft` run as they are, also with adapted experts; an adapter of the
router has to be merged into the weights first (`merge_and_unload`). Quantised and adapted experts
are not computed one by one, so `compensated`, `exact-norm` and what needs toggled experts are
refused.

## Refused families

| model type | why |
|---|---|
"""


def refusals():
    """Return the rows of the table of refused families."""
    for name, (_, _, reason) in REFUSED.items():
        yield f"| {name} | {reason} |"


def page():
    """Return the page as what is tested here says it."""
    return HEAD + "\n".join(rows()) + "\n" + REST + "\n".join(refusals()) + "\n"


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused_in_one_line(name):
    """Of a model without values, as read from the config alone."""
    prefix, settings, reason = REFUSED[name]
    with torch.device("meta"):
        model = build(prefix, settings)
    with pytest.raises(InputError) as caught:
        find_routers(model)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"model class {type(model).__name__} has no supported router")
    assert reason in line
    assert f"(model type '{model.config.model_type}')" in line


def test_the_table_is_up_to_date():
    """Write the page with ``PYTHONPATH=tests python tests/engine/test_families.py``."""
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
