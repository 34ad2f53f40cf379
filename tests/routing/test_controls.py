from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from slow_loops import router_inputs

from moe_routing.errors import InputError
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.strategies.controls import EqualBudget
from moe_routing.routing.types import RouterInputs, Selection

BASES = ["bh_k16_a010", "threshold_k16_a030_random-direction", "topp_k16_p050", "adaptive_k8"]


@pytest.fixture
def inputs(rng) -> RouterInputs:
    logits_TE = rng.standard_normal((2500, 64)).astype(np.float32)
    logits_TE[::2, :6] += 4
    return router_inputs(torch.from_numpy(rng.permuted(logits_TE, axis=1)), layer=1)


def histogram_of(selection: Selection) -> list[list[int]]:
    """Return the decisions by number of experts, alike in both layers."""
    return [torch.bincount(selection.count_T, minlength=65).tolist()] * 2


@pytest.fixture
def select(calibration_of, inputs):
    """Route the inputs by an id, in a context of its own; equal budgets are those of the base."""

    def run(strategy_id: str, used: RouterInputs = inputs, passes: int = 1) -> Selection:
        strategy = parse_strategy(strategy_id)
        if isinstance(strategy, EqualBudget):
            strategy = strategy.like(histogram_of(run(strategy.base.id)))
        selector = strategy.selector(calibration_of(64), 64)
        for _ in range(passes):
            selection = selector(used, used.logits_TE.softmax(-1))
        return selection

    return run


@pytest.mark.parametrize("base_id", BASES)
def test_shuffle_permutes_counts_and_keeps_each_tokens_order(
    calibration_of, inputs, select, base_id
):
    base, control = select(base_id), select(f"shuffle.{base_id}")
    assert torch.equal(base.count_T.sort().values, control.count_T.sort().values)
    assert torch.equal(base.rejected_T.sort().values, control.rejected_T.sort().values)
    moved = (base.count_T != control.count_T).double().mean()
    assert moved > 0.3
    strategy = parse_strategy(base_id)
    ranking = strategy.ranker(calibration_of(64), 64)(inputs, inputs.logits_TE.softmax(-1))
    for index_K, order_K, count in zip(
        control.index_TK, ranking.order_TK, control.count_T.tolist(), strict=True
    ):
        assert torch.equal(index_K[:count], order_K[:count])
        assert (index_K[count:] == 64).all()


def test_shuffle_breaks_the_link_between_token_and_count(inputs, select):
    base, control = select("bh_k16_a010"), select("shuffle.bh_k16_a010")
    easy_T = inputs.logits_TE.amax(1).numpy()
    assert abs(stats.spearmanr(easy_T, base.count_T).statistic) > 0.3
    assert abs(stats.spearmanr(easy_T, control.count_T).statistic) < 0.08


def test_shuffle_stays_among_real_tokens(rng, inputs, select):
    mask_T = torch.from_numpy(rng.random(2500) < 0.6)
    padded = dataclasses.replace(inputs, mask_T=mask_T)
    base, control = select("bh_k16_a010"), select("shuffle.bh_k16_a010", padded)
    assert torch.equal(base.count_T[mask_T].sort().values, control.count_T[mask_T].sort().values)
    assert not torch.equal(base.count_T[mask_T], control.count_T[mask_T])
    assert torch.equal(base.count_T[~mask_T], control.count_T[~mask_T])


@pytest.mark.parametrize("control", ["shuffle", "randomid"])
def test_draws_depend_on_seed_layer_and_pass_only(inputs, select, control):
    # The base treats all layers alike, so that only the draws can differ between them.
    first = select(f"{control}.topp_k16_p050")
    again = select(f"{control}.topp_k16_p050")
    other = select(f"{control}_s1.topp_k16_p050")
    later = select(f"{control}.topp_k16_p050", passes=2)
    layer = select(f"{control}.topp_k16_p050", dataclasses.replace(inputs, layer=0))
    assert torch.equal(first.index_TK, again.index_TK)
    for different in (other, later, layer):
        assert not torch.equal(first.index_TK[:, :1], different.index_TK[:, :1]) or not torch.equal(
            first.count_T, different.count_T
        )


@pytest.mark.parametrize("base_id", BASES)
def test_random_identity_keeps_counts_and_draws_every_expert_alike(inputs, select, base_id):
    base, control = select(base_id), select(f"randomid.{base_id}")
    assert torch.equal(base.count_T, control.count_T)
    chosen = control.index_TK[control.index_TK < 64]
    load_E = torch.bincount(chosen, minlength=64).numpy()
    assert load_E.sum() == int(base.count_T.sum())
    assert stats.chisquare(load_E).pvalue > 1e-4
    for index_K, count in zip(control.index_TK.tolist(), control.count_T.tolist(), strict=True):
        assert len(set(index_K[:count])) == count


def test_random_identity_takes_no_masked_expert(inputs, select):
    logits_TE = inputs.logits_TE.clone()
    logits_TE[:, 10:] = -torch.inf
    masked = dataclasses.replace(inputs, logits_TE=logits_TE)
    for control in ("randomid", "shuffle", "layermean", "counts"):
        index_TK = select(f"{control}.topp_k16_p090", masked).index_TK
        assert set(index_TK.unique().tolist()) <= {*range(10), 64}


def test_shuffle_gives_no_token_more_experts_than_it_has(inputs, select):
    logits_TE = inputs.logits_TE.clone()
    logits_TE[::2, 3:] = -torch.inf
    masked = dataclasses.replace(inputs, logits_TE=logits_TE)
    control = select("shuffle.topp_k16_p090", masked)
    assert int(control.count_T[1::2].max()) > 3
    assert int(control.count_T[::2].max()) == 3
    assert set(control.index_TK[::2].unique().tolist()) == {0, 1, 2, 64}


@pytest.mark.parametrize("base_id", BASES)
def test_layer_mean_rounds_the_mean_of_the_layer_at_random(select, base_id):
    base, control = select(base_id), select(f"layermean.{base_id}")
    mean = float(base.count_T.double().mean())
    low, high = int(np.floor(mean)), int(np.ceil(mean))
    assert set(control.count_T.tolist()) == {low, high}
    # Two binomial standard errors of 2,500 tokens are at most .02.
    assert float(control.count_T.double().mean()) == pytest.approx(mean, abs=0.03)


@pytest.mark.parametrize("base_id", BASES)
def test_drawn_counts_have_the_law_of_the_base_and_not_its_tokens(select, inputs, base_id):
    base, control = select(base_id), select(f"counts.{base_id}")
    observed, expected = (
        torch.bincount(one.count_T, minlength=17).numpy() for one in (control, base)
    )
    assert not observed[expected == 0].any()
    common = expected >= 20
    rest = (observed[~common].sum(), expected[~common].sum())
    table = [np.r_[one[common], tail] for one, tail in zip((observed, expected), rest, strict=True)]
    assert stats.chi2_contingency(np.array(table)[:, np.array(table).sum(0) > 0]).pvalue > 1e-4
    assert abs(stats.spearmanr(base.count_T, control.count_T).statistic) < 0.08


@pytest.mark.parametrize("base_id", BASES)
def test_the_static_mixture_has_the_mean_of_the_base_and_the_models_order(select, inputs, base_id):
    base, control = select(base_id), select(f"mixture.{base_id}")
    mean = float(base.count_T.double().mean())
    assert set(control.count_T.tolist()) == {int(np.floor(mean)), int(np.ceil(mean))}
    assert float(control.count_T.double().mean()) == pytest.approx(mean, abs=0.03)
    top_TK = inputs.logits_TE.topk(control.index_TK.shape[1]).indices
    for index_K, top_K, count in zip(control.index_TK, top_TK, control.count_T, strict=True):
        assert index_K[:count].tolist() == top_K[:count].tolist()


@pytest.mark.parametrize("control", ["mixture", "counts", "layermean"])
def test_draws_at_equal_budget_belong_to_the_token(inputs, select, control):
    name = "topp_k16_p050"
    keyed = dataclasses.replace(inputs, key_T=torch.arange(2500) * 12345)
    first = select(f"{control}.{name}", keyed).count_T
    assert torch.equal(first, select(f"{control}.{name}", keyed, passes=2).count_T)
    order_T = torch.randperm(2500)
    other = keyed.rows(order_T)
    assert torch.equal(select(f"{control}.{name}", other).count_T, first[order_T])
    for different in (
        select(f"{control}_s1.{name}", keyed),
        select(f"{control}.{name}", dataclasses.replace(keyed, layer=0)),
        select(f"{control}.{name}", dataclasses.replace(keyed, key_T=keyed.key_T + 1)),
    ):
        assert (different.count_T != first).double().mean() > 0.2


def test_a_control_at_equal_budget_has_to_know_the_base(calibration_of):
    strategy = parse_strategy("mixture.topp_k16_p050")
    with pytest.raises(InputError, match=r"'topp_k16_p050' uses on the same text; none given"):
        strategy.selector(calibration_of(64), 64)


def test_controls_inherit_everything_else():
    base = parse_strategy("bh_k16_a005_pooled_renormalised")
    for family in ("shuffle", "layermean", "counts", "randomid"):
        control = parse_strategy(f"{family}.{base.id}")
        assert control.needs_null == "pooled"
        assert control.needs_calibration
        assert control.weighting_kind == "renormalised"
        assert (control.min_experts, control.max_experts) == (1, 16)
        assert control.model_dump()["base"] == base.model_dump()
    assert not parse_strategy("shuffle.topp_k8_p050").needs_calibration
