from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from moe_pretraining.loss import CHUNK, linear_cross_entropy, router_losses


def sample(tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, 12, generator=generator, dtype=dtype).requires_grad_()
    weight_VH = torch.randn(37, 12, generator=generator, dtype=dtype).requires_grad_()
    return hidden_TH, weight_VH, torch.randint(37, (tokens,), generator=generator)


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 17])
def test_linear_cross_entropy_and_gradients_equal_torchs(tokens: int):
    hidden_TH, weight_VH, target_T = sample(tokens, torch.float32)
    expected = F.cross_entropy(hidden_TH @ weight_VH.T, target_T)
    gradients = torch.autograd.grad(2.5 * expected, (hidden_TH, weight_VH))
    loss = linear_cross_entropy(hidden_TH, weight_VH, target_T)
    found = torch.autograd.grad(2.5 * loss, (hidden_TH, weight_VH))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)


def test_emphasised_targets_weigh_more_in_the_mean():
    hidden_TH, weight_VH, target_T = sample(2 * CHUNK + 17, torch.float32)
    generator = torch.Generator().manual_seed(1)
    emphasis_T = 0.5 + 9 * torch.rand(target_T.shape, generator=generator)
    losses_T = F.cross_entropy(hidden_TH @ weight_VH.T, target_T, reduction="none")
    expected = (losses_T * emphasis_T).sum() / emphasis_T.sum()
    gradients = torch.autograd.grad(expected, (hidden_TH, weight_VH))
    loss = linear_cross_entropy(hidden_TH, weight_VH, target_T, emphasis_T)
    found = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)


def test_linear_cross_entropy_keeps_the_dtype_of_its_gradients():
    hidden_TH, weight_VH, target_T = sample(300, torch.bfloat16)
    loss = linear_cross_entropy(hidden_TH, weight_VH, target_T)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden_TH.grad.dtype == weight_VH.grad.dtype == torch.bfloat16
    reference = F.cross_entropy((hidden_TH @ weight_VH.T).float(), target_T)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)


def test_linear_cross_entropy_gradients_equal_differences():
    # The loss is computed in float32, so the step is as wide as its rounding asks for.
    hidden_TH, weight_VH, target_T = sample(5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, target_T),
        (hidden_TH, weight_VH),
        eps=1e-2,
        atol=2e-4,
        rtol=2e-3,
    )


def test_linear_cross_entropy_without_gradients():
    hidden_TH, weight_VH, target_T = sample(300, torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden_TH, weight_VH, target_T)
    torch.testing.assert_close(loss, F.cross_entropy(hidden_TH @ weight_VH.T, target_T))


def slow_losses(logits_TE: np.ndarray, top_k: int) -> tuple[float, float, float]:
    """Token by token, expert by expert."""
    tokens, experts = logits_TE.shape
    assigned, probability = [0] * experts, [0.0] * experts
    z_loss = 0.0
    for row in logits_TE:
        total = sum(math.exp(x) for x in row)
        z_loss += math.log(total) ** 2 / tokens
        for expert in range(experts):
            probability[expert] += math.exp(row[expert]) / total / tokens
        for expert in sorted(range(experts), key=lambda e: -row[e])[:top_k]:
            assigned[expert] += 1
    proportions = [count / (tokens * top_k) for count in assigned]
    balance = experts * sum(f * p for f, p in zip(proportions, probability, strict=True))
    return balance, z_loss, max(proportions) * experts


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 12),
    layers=st.integers(1, 3),
    scale=st.floats(0.01, 5),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_router_losses_equal_a_slow_loop(tokens, experts, layers, scale, seed, data):
    top_k = data.draw(st.integers(1, experts))
    rng = np.random.default_rng(seed)
    logits_LTE = rng.normal(0, scale, (layers, tokens, experts)).astype(np.float32)
    found = router_losses(tuple(torch.from_numpy(layer) for layer in logits_LTE), top_k)
    slow = np.array([slow_losses(layer.astype(float), top_k) for layer in logits_LTE])
    np.testing.assert_allclose(found.load_balancing.item(), slow[:, 0].sum(), rtol=2e-5)
    np.testing.assert_allclose(found.z_loss.item(), slow[:, 1].sum(), rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(found.max_load.item(), slow[:, 2].max(), rtol=1e-5)


def test_load_balancing_of_one_layer_is_that_of_transformers():
    logits_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = router_losses((logits_TE,), 2).load_balancing
    theirs = load_balancing_loss_func((logits_TE,), num_experts=8, top_k=2)
    # They do not divide by the experts of a token, so that theirs is top-k when balanced.
    torch.testing.assert_close(2 * ours, theirs)
    gradients = [torch.autograd.grad(loss, logits_TE)[0] for loss in (2 * ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_a_collapsed_layer_shows_though_others_balance_it():
    # Two layers that each use their own half of the experts: over both together all is even.
    left = torch.tensor([[5.0, 5.0, -5.0, -5.0]]).repeat(8, 1)
    right = left.flip(1)
    together = load_balancing_loss_func((left, right), num_experts=4, top_k=2)
    torch.testing.assert_close(together, torch.tensor(2.0))  # their optimum
    losses = router_losses((left, right), 2)
    assert losses.load_balancing.item() / 2 == pytest.approx(2.0, abs=1e-3)  # 1 when balanced
    assert losses.max_load.item() == 2.0
