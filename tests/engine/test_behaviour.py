"""A router is what it does: rules are found, however they are written, and others refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_routing.engine.behaviour import Blueprint, Grouping, observe
from moe_routing.errors import InputError

EXPERTS, HIDDEN = 8, 16


class Written(nn.Module):
    """A router of settings; subclasses write a rule."""

    def __init__(self, top_k=2, **settings):
        super().__init__()
        self.top_k = top_k
        vars(self).update(settings)
        self.weight = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))

    def scores(self, logits):
        """Return what the weights are made of."""
        return logits.softmax(-1)

    def forward(self, hidden):
        """Route."""
        logits = hidden @ self.weight.T
        weights, index = self.scores(logits).topk(self.top_k)
        return logits, self.weigh(weights), index

    def weigh(self, weights):
        """Return the weights of the selected experts."""
        return weights


class Renormalised(Written):
    def weigh(self, weights):
        """Return weights of sum 3."""
        return 3 * weights / weights.sum(-1, keepdim=True)


class Sigmoid(Renormalised):
    def scores(self, logits):
        """Return sigmoid scores."""
        return logits.sigmoid()


class Biased(Written):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.inner = nn.Module()
        self.inner.e_score_correction_bias = nn.Parameter(torch.zeros(1, EXPERTS))

    def forward(self, hidden):
        """Select by the scores and a bias."""
        logits = hidden @ self.weight.T
        scores = logits.softmax(-1)
        index = (scores + self.inner.e_score_correction_bias).topk(self.top_k).indices
        return logits, scores.gather(1, index), index


class Squared(Written):
    def weigh(self, weights):
        """Return something else."""
        return weights**2


class Smallest(Written):
    def scores(self, logits):
        """Prefer the smallest logits."""
        return (-logits).softmax(-1)


class Raw(Written):
    def forward(self, hidden):
        """Return logits, and the largest of them as weights."""
        logits = hidden @ self.weight.T
        weights, index = logits.topk(self.top_k)
        return logits, weights, index


class RawSigmoid(Written):
    def forward(self, hidden):
        """Return sigmoid scores in place of logits, and the largest of them as weights."""
        scores = (hidden @ self.weight.T).sigmoid()
        weights, index = scores.topk(self.top_k)
        return scores, weights, index


class Probabilities(Written):
    def forward(self, hidden):
        """Return probabilities in place of logits, and weights with a factor of each expert."""
        scores = (hidden @ self.weight.T).softmax(-1)
        weights, index = scores.topk(self.top_k)
        return scores, weights * self.per_expert_scale[index], index

    def __init__(self, **settings):
        super().__init__(**settings)
        self.per_expert_scale = nn.Parameter(torch.linspace(0.5, 2, EXPERTS))


class Bare(Written):
    def forward(self, hidden):
        """Return logits alone."""
        return hidden @ self.weight.T


class Needy(Written):
    def forward(self, hidden, input_ids):
        """Ask for more than hidden states."""
        return super().forward(hidden)


def seen(module):
    return observe(Blueprint.of(module))


def test_the_rules_that_are_known():
    raw = seen(Written())
    assert (raw.score, raw.rule.weighting, raw.rule.factor) == ("softmax", "softmax", 1.0)
    assert raw.linear
    assert raw.rounds
    renormalised = seen(Renormalised())
    assert (renormalised.score, renormalised.rule.weighting) == ("softmax", "renormalised")
    assert renormalised.rule.factor == 3.0
    assert seen(Sigmoid()).score == "sigmoid"
    assert not seen(Sigmoid()).rule.biased
    given = seen(Probabilities())
    assert (given.score, given.scale, given.rule.weighting) == (
        "given", "per_expert_scale", "softmax",
    )  # fmt: skip
    assert not given.linear
    assert given.logits(torch.zeros(1, 2)).isfinite().all()
    biased = seen(Biased())
    assert biased.bias == "inner.e_score_correction_bias"
    assert biased.rule.biased


def test_one_expert_per_token_shows_the_rule_too():
    """A renormalised weight of one expert is 1, whatever its score."""
    assert seen(Sigmoid(top_k=1)).score == "sigmoid"
    assert seen(Renormalised(top_k=1)).score == "softmax"
    assert seen(Sigmoid(top_k=1)).rule.top_k == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Squared, "its weights are not softmax or sigmoid scores"),
        (Smallest, "its weights are not softmax or sigmoid scores"),
        (Raw, "its weights are not softmax or sigmoid scores"),
        (RawSigmoid, "its weights are not softmax or sigmoid scores"),
        (Bare, "returns 1 values; allowed: logits, weights and experts"),
        (Needy, "takes input_ids beside hidden states"),
        (nn.Identity, "it has 0 weight matrices"),
    ],
)
def test_other_routers_are_refused(kind, reason):
    assert reason in seen(kind())


@pytest.mark.parametrize("top_k", [0, 9])
def test_a_number_of_experts_that_cannot_be(top_k):
    with pytest.raises(InputError, match=rf"num_experts_per_tok is {top_k}; allowed: 1 to 8"):
        seen(Written(top_k=top_k))


def test_the_values_of_the_tensors_do_not_matter():
    """A bias of zeros, as in a model that was never trained, is found as any other."""
    module = Biased()
    before = Blueprint.of(module)
    module.weight.data.normal_()
    assert Blueprint.of(module) == before
    assert Blueprint.of(module.to("meta")) == before
    module.top_k = 3
    assert Blueprint.of(module) != before


@pytest.mark.parametrize("measure", ["max", "top2"])
def test_groups_by_hand(measure):
    choice_TE = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
    found_TE = Grouping(4, 2, measure).mask(choice_TE)
    for row, found in zip(choice_TE.tolist(), found_TE.tolist(), strict=True):
        groups = [sorted(row[start : start + 3], reverse=True) for start in (0, 3, 6, 9)]
        value = [group[0] if measure == "max" else sum(group[:2]) for group in groups]
        best = sorted(range(4), key=lambda group: -value[group])[:2]
        kept = [x if e // 3 in best else -float("inf") for e, x in enumerate(row)]
        assert found == kept
