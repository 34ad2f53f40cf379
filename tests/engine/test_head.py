"""Chunked log-likelihoods against the log-softmax of all logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_routing.engine import head


def make(dtype, tokens=50, vocabulary=300):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(8, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    layer.weight.data = (5 * torch.randn(vocabulary, 8, generator=generator)).to(dtype)
    hidden = torch.randn(tokens, 8, generator=generator).to(dtype)
    return layer, hidden, torch.randint(vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [(7, 64), (50, 299), (1000, 1000)])
@pytest.mark.parametrize("greedy", [True, False])
def test_blocks_are_the_whole(dtype, blocks, greedy, monkeypatch):
    monkeypatch.setattr(head, "CPU_BLOCKS", head.Blocks(*blocks))
    layer, hidden, target = make(dtype)
    target[:25] = layer(hidden[:25]).argmax(-1)
    likelihood, best = head.target_log_likelihoods(layer, hidden, target, greedy=greedy)
    wide = torch.promote_types(dtype, torch.float32)
    expected = layer(hidden).to(wide).log_softmax(-1)
    assert likelihood.dtype == wide
    torch.testing.assert_close(likelihood, expected.gather(1, target[:, None])[:, 0])
    if greedy:
        assert torch.equal(best, expected.argmax(-1) == target)
        assert best[:25].all()
    else:
        assert best is None


def test_of_equal_tokens_the_first_is_greedy(monkeypatch):
    monkeypatch.setattr(head, "CPU_BLOCKS", head.Blocks(2, 100))
    layer, hidden, target = make(torch.float32, tokens=4)
    layer.weight.data[:] = layer.weight.data[0]
    target[:] = torch.tensor([0, 1, 200, 0])
    _, best = head.target_log_likelihoods(layer, hidden, target)
    assert best.tolist() == [True, False, False, True]


@pytest.mark.parametrize("shift", [-1e4, -90.0, -80.0, 80.0, 90.0, 1e4])
def test_logits_beyond_the_range_of_the_exponential(shift):
    layer, hidden, target = make(torch.float32)
    layer.bias = nn.Parameter(torch.full((300,), shift))
    expected = layer(hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    likelihood, _ = head.target_log_likelihoods(layer, hidden, target)
    torch.testing.assert_close(likelihood, expected, rtol=1e-5, atol=1e-5 * max(1, abs(shift) / 99))


def test_large_logits_do_not_overflow():
    layer, hidden, target = make(torch.float32)
    layer.weight.data *= 1e4
    likelihood, _ = head.target_log_likelihoods(layer, hidden, target)
    assert likelihood.isfinite().all()
    assert (likelihood <= 0).all()


def test_a_head_with_bias():
    layer, hidden, target = make(torch.float64)
    layer.bias = nn.Parameter(torch.linspace(-3, 3, 300, dtype=torch.float64))
    likelihood, _ = head.target_log_likelihoods(layer, hidden, target)
    expected = layer(hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(likelihood, expected)
