"""Layouts of packed attention against one plain causal attention per request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_routing.engine import attention
from moe_routing.engine.packing import build, group_by_prefix
from moe_routing.engine.requests import TokenRequest

HEADS, D = 3, 4


def make_batch(rng):
    """Prefix groups with and without continuations, some empty, of equal and unequal lengths."""
    shapes = [(20, (3, 0, 5)), (9, (1, 1)), (70, ()), (70, ()), (130, ()), (12, (4, 4)), (1, ())]
    requests, groups = [], []
    for prefix, continuations in shapes:
        shared = rng.integers(0, 50, prefix).tolist()
        group = []
        for index, length in enumerate(continuations or (0,)):
            own = [100 + index, *rng.integers(0, 50, length - 1).tolist()] if length else []
            group.append(len(requests))
            requests.append(TokenRequest(shared + own, [0]))
        groups.append(group)
    return build(requests, group_by_prefix(requests, groups))


@pytest.mark.parametrize("layout", [attention.SlicedLayout, attention.PaddedLayout])
@pytest.mark.parametrize("block", [16, 1000])
@pytest.mark.parametrize("key_heads", [1, HEADS])
@pytest.mark.parametrize("window", [None, 1, 7, 64, 500])
def test_each_request_attends_to_itself_only(layout, block, key_heads, window, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    rng = np.random.default_rng(0)
    batch = make_batch(rng)
    tokens = batch.ids_T.size
    query, key, value = (
        torch.from_numpy(rng.standard_normal((1, heads, tokens, D)))
        for heads in (HEADS, key_heads, key_heads)
    )
    plan = layout(batch.spans, torch.float64, torch.device("cpu"))
    out, _ = attention.packed_attention_forward(
        torch.nn.Identity(), query, key, value, None, scaling=0.3, layout=plan,
        sliding_window=window,
    )  # fmt: skip
    assert out.shape == (1, tokens, HEADS, D)
    assert out.is_contiguous()
    for start, fork, begin, end in batch.paths:
        path = np.r_[start:fork, begin:end]
        age = torch.arange(len(path))[:, None] - torch.arange(len(path))
        seen = (age >= 0) & (age < (window or tokens))
        alone = F.scaled_dot_product_attention(
            query[:, :, path], key[:, :, path], value[:, :, path],
            attn_mask=seen, scale=0.3, enable_gqa=True,
        )  # fmt: skip
        torch.testing.assert_close(out[:, path], alone.transpose(1, 2))


def test_a_batch_without_layout_is_refused():
    rows = torch.zeros(1, 1, 2, 4)
    with pytest.raises(TypeError, match="layout"):
        attention.packed_attention_forward(torch.nn.Identity(), rows, rows, rows, None)


@pytest.mark.parametrize("given", [{"softcap": 30.0}, {"s_aux": torch.zeros(1)}])
@pytest.mark.parametrize("layout", [attention.SlicedLayout, attention.PaddedLayout])
def test_what_would_change_the_scores_is_refused(given, layout):
    requests = [TokenRequest(list(range(20)), [0])]
    batch = build(requests, group_by_prefix(requests, [[0]]))
    plan = layout(batch.spans, torch.float32, torch.device("cpu"))
    rows = torch.ones(1, 1, 20, 4)

    def attend(**options):
        module = torch.nn.Identity()
        return attention.packed_attention_forward(module, rows, rows, rows, layout=plan, **options)

    with pytest.raises(TypeError, match=f"does not know what to do with {next(iter(given))}"):
        attend(attention_mask=None, **given)
    with pytest.raises(TypeError, match="does not know what to do with attention_mask"):
        attend(attention_mask=torch.zeros(1))
    attend(attention_mask=None, softcap=None, sliding_window=20, position_ids=torch.zeros(1))


def test_the_model_s_attention_is_restored(model):
    before = model.config._attn_implementation

    def fail():
        with attention.packed_attention(model):
            assert model.config._attn_implementation == attention.ATTENTION_IMPLEMENTATION
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model.config._attn_implementation == before
