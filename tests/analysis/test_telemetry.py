"""Recorders count what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_routing.analysis.telemetry import (
    DecodingRecorder,
    SwitchedRecorder,
    UnionRecorder,
    distinct_experts,
)
from moe_routing.engine.context import ForwardContext, forward_context
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.routed import routed


def test_distinct_experts_equal_a_loop(rng):
    index = torch.from_numpy(np.argsort(rng.random((26, 7)), axis=1)[:, :3])
    index[4, 2] = index[9, 1] = 7  # padded slots
    found = distinct_experts(index, 7, 4).tolist()
    assert len(found) == 6
    for group, count in enumerate(found):
        tokens = [group + 6 * place for place in range(4)]
        assert count == len({e for t in tokens for e in index[t].tolist()} - {7})


def test_too_few_tokens_make_no_batch():
    assert distinct_experts(torch.zeros(3, 2, dtype=torch.int64), 4, 4).numel() == 0
    assert np.isnan(UnionRecorder(4).mean_distinct())


@pytest.fixture
def ids(tokenizer, texts):
    return torch.tensor([tokenizer(texts[2])["input_ids"][:24]])


def test_a_batch_of_one_token_needs_its_own_experts(tiny, ids):
    recorder = UnionRecorder(1)
    with routed(tiny, "regular_k3", recorder=recorder), torch.inference_mode():
        tiny(ids)
    assert recorder.mean_distinct() == 3.0
    assert recorder.statistics().mean_experts() == 3.0


def test_a_batch_of_all_tokens_needs_the_union_of_a_forward(tiny, ids):
    recorder = UnionRecorder(24)
    with routed(tiny, "regular_k2", recorder=recorder), torch.inference_mode():
        tiny(ids)
    expected = recorder.statistics().unique_experts_L.mean()
    assert recorder.mean_distinct() == pytest.approx(expected)
    assert 2 < recorder.mean_distinct() <= 8


def test_padding_needs_no_experts(tiny, ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 12:] = False
    recorder = UnionRecorder(12)
    context = ForwardContext(mask_T=mask.reshape(-1))
    with routed(tiny, "regular_k2", recorder=recorder), forward_context(context), torch.no_grad():
        tiny(ids)
    whole = UnionRecorder(12)
    with routed(tiny, "regular_k2", recorder=whole), torch.inference_mode():
        tiny(ids[:, :12])
    assert recorder.mean_distinct() == whole.mean_distinct()


def test_only_decoding_steps_are_recorded(tiny, ids):
    recorder = DecodingRecorder()
    with routed(tiny, "regular_k2", recorder=recorder), torch.inference_mode():
        tiny.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=6,
            max_new_tokens=6, pad_token_id=0,
        )  # fmt: skip
    statistics = recorder.statistics()
    # The last token that is generated is never read.
    assert statistics.tokens == 5
    assert statistics.mean_experts() == 2.0


def test_a_switched_recorder_records_for_one_at_a_time(tiny, ids):
    first, second = Recorder(), Recorder()
    switch = SwitchedRecorder(first)
    with routed(tiny, "regular_k2", recorder=switch), torch.inference_mode():
        tiny(ids)
        switch.recorder = second
        tiny(ids[:, :5])
    assert (first.statistics().tokens, second.statistics().tokens) == (24, 5)
