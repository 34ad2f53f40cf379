"""The last layer's experts see what is read, and nothing else changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest
import torch

from moe_routing.engine.last_layer import Read, spared_last_experts
from moe_routing.engine.patching import swapped
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.requests import Request
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer


@pytest.fixture
def ids():
    return torch.arange(40)[None]


@pytest.fixture
def seen(double):
    """Numbers of tokens that the experts of the last two layers got, call by call."""
    counts = {14: [], 15: []}

    def spy(seen, compute):
        def forward(hidden_TH, *rest):
            seen.append(hidden_TH.shape[0])
            return compute(hidden_TH, *rest)

        return forward

    with ExitStack() as stack:
        for place, seen in counts.items():
            experts = double.model.layers[place].mlp.experts
            stack.enter_context(swapped(experts, partial(spy, seen)))
        yield counts


@pytest.mark.parametrize("experts", ["eager", "dropless"])
@torch.inference_mode()
def test_what_is_read_is_what_the_whole_layer_gives(double, ids, experts):
    read = Read()
    with routed(double, "regular_k8", experts_implementation=experts):
        whole = double.base_model(ids, use_cache=False).last_hidden_state
        with spared_last_experts(double, read):
            assert torch.equal(double.base_model(ids, use_cache=False).last_hidden_state, whole)
            read.token_N = torch.tensor([3, 4, 39])
            some = double.base_model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(some[:, read.token_N], whole[:, read.token_N])
    assert not torch.allclose(some[:, 5:39], whole[:, 5:39])
    assert "forward" not in vars(double.model.layers[-1].mlp.experts)


def test_each_thread_reads_its_own():
    read = Read()
    read.token_N = torch.tensor([1])
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: read.token_N).result() is None


def test_the_engine_spares_the_last_experts_and_records_every_token(
    double, tokenizer, choice_requests, seen
):
    recorder = Recorder()
    with routed(double, "regular_k4", recorder=recorder):
        Scorer(double, tokenizer, recorder=recorder).score(choice_requests[:4])
    statistics = recorder.statistics()
    (all_tokens,), (read,) = seen[14], seen[15]
    targets = sum(len(tokenizer(r.continuation).input_ids) for r in choice_requests[:4])
    # The last token of the shared context is read for all four, and counts once.
    assert read == targets - 3 < all_tokens == statistics.tokens
    assert statistics.load_LE.sum(1).tolist() == [4 * all_tokens] * 16


def test_documents_read_every_token(double, tokenizer, documents, seen):
    Scorer(double, tokenizer).score_rolling(documents[:1])
    assert seen[14] == seen[15]


def test_a_last_layer_without_experts_stays_as_it_is(double, tokenizer, ids):
    request = [Request("One two three", " four")]
    last = double.model.layers[-1]
    block = last.mlp
    last.mlp = torch.nn.Linear(128, 128, bias=False, dtype=torch.float64).requires_grad_(False)
    try:
        with spared_last_experts(double, Read()):
            assert "forward" not in vars(last.mlp)
        assert Scorer(double, tokenizer).score(request)[0].tokens == 1
    finally:
        last.mlp = block
