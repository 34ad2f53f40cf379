"""Tokens of requests against lm-evaluation-harness's own encoding."""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_routing.engine.requests import (
    Encoder,
    Request,
    appended_tokens,
    max_length,
    own_tokens,
)
from moe_routing.errors import InputError


class HarnessEncoding(HFLM):
    """The harness's encoding, without a model: it returns what would be scored."""

    enable_thinking = False

    def __init__(self, tokenizer, longest):
        self.tokenizer = tokenizer
        self._max_length = longest
        self.backend = "causal"
        self.add_bos_token = None
        self.custom_prefix_token_id = None

    def _loglikelihood_tokens(self, requests, **_):
        return [((c + t)[-(self.max_length + 1) :][:-1], t) for _, c, t in requests]


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A byte-level tokenizer that puts a beginning-of-sequence token before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate(["<s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    special = {"bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


@pytest.fixture(scope="module")
def ending_tokenizer(nano):
    """The embedded model's tokenizer as fine-tuning may save it: it ends every text."""
    tokenizer = copy.deepcopy(nano.tokenizer)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    return tokenizer


def by_harness(tokenizer, longest, requests, ask):
    arguments = [(request.context, request.continuation) for request in requests]
    harness = HarnessEncoding(tokenizer, longest)
    return harness.loglikelihood(ask("loglikelihood", arguments), disable_tqdm=True)


def by_us(tokenizer, longest, requests):
    encoded = Encoder(tokenizer, longest, batch_size=3).requests(requests)
    return [(request.input_ids, request.target_ids) for request in encoded]


CASES = [
    Request("The cat sat on the", " mat."),
    Request("The cat sat on the ", "mat."),  # the space moves
    Request("The cat sat on the \n ", "mat."),
    Request("", "No context at all"),
    Request("", " No context, but a space"),
    Request("wait", "ing"),  # the cut falls inside what would be one token
    Request("x " * 300, "y"),  # cut off from the left
    Request("", "<|endoftext|>A text that starts with the prefix token"),
    Request("<|endoftext|>So does this", " context"),
]


def test_pairs_are_the_harness_s(tokenizer, choice_requests, word_requests, ask):
    cases = CASES + choice_requests + word_requests
    assert by_us(tokenizer, 256, cases) == by_harness(tokenizer, 256, cases, ask)


def test_pairs_with_a_beginning_of_sequence_token(byte_tokenizer, ask):
    cases = [*CASES[:7], Request("<s>given", " twice"), Request("  ", "spaces only")]
    ours = by_us(byte_tokenizer, 64, cases)
    assert ours == by_harness(byte_tokenizer, 64, cases, ask)
    assert ours[0][0][0] == 0


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context=st.text(max_size=30), continuation=st.text(min_size=1, max_size=20))
def test_any_text(context, continuation, tokenizer, ask):
    requests = [Request(context, continuation)]
    if context and not context.strip():
        return  # the harness fails on these; see the next test
    theirs = by_harness(tokenizer, 16, requests, ask)
    if 0 < len(theirs[0][1]) <= 16:
        assert by_us(tokenizer, 16, requests) == theirs
    else:  # where the harness would fail, as on "0" + "0", which is one token
        with pytest.raises(InputError):
            by_us(tokenizer, 16, requests)


def test_tokens_that_a_tokenizer_puts_at_the_end_are_neither_read_nor_scored(
    ending_tokenizer, tokenizer, byte_tokenizer, choice_requests, documents
):
    assert ending_tokenizer("a river")["input_ids"][-1] == tokenizer.eos_token_id
    assert appended_tokens(ending_tokenizer) == 1
    assert appended_tokens(tokenizer) == appended_tokens(byte_tokenizer) == 0
    cases = [*CASES, *choice_requests]
    assert by_us(ending_tokenizer, 256, cases) == by_us(tokenizer, 256, cases)
    ours, theirs = (Encoder(t, 64).rolling(documents) for t in (ending_tokenizer, tokenizer))
    assert ours == theirs
    assert own_tokens(ending_tokenizer, "a river") == own_tokens(tokenizer, "a river")


def test_tokens_at_both_ends_of_a_text(byte_tokenizer):
    both = copy.deepcopy(byte_tokenizer)
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <s> <s>", special_tokens=[("<s>", 0)]
    )
    assert appended_tokens(both) == 2
    assert by_us(both, 64, CASES[:7]) == by_us(byte_tokenizer, 64, CASES[:7])


def test_a_context_of_spaces_only_is_no_context(tokenizer):
    encoder = Encoder(tokenizer, 256)
    request = encoder.requests([Request("  ", "word")])[0]
    assert request.input_ids[0] == encoder.prefix_token
    assert tokenizer.decode(request.target_ids) == "  word"


@pytest.mark.parametrize("longest", [4, 7, 256])
def test_windows_are_the_harness_s(tokenizer, documents, longest):
    encoder = Encoder(tokenizer, longest)
    for text, windows in zip(documents, encoder.rolling(documents), strict=True):
        pairs = get_rolling_token_windows(
            tokenizer(text, verbose=False)["input_ids"], encoder.prefix_token, longest, 1
        )
        theirs = [make_disjoint_window(pair) for pair in pairs]
        assert [w.target_ids for w in windows] == [target for _, target in theirs]
        assert [w.input_ids for w in windows] == [(c + t)[:-1] for c, t in theirs]
        assert all(len(window.input_ids) <= longest for window in windows)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("some context", ""), "has no token"),
        (Request("", ""), "has no token"),
        (Request("a", " b" * 300), "at most the window of 256"),
    ],
)
def test_what_cannot_be_scored_is_one_line(tokenizer, request_, message):
    with pytest.raises(InputError, match=message):
        Encoder(tokenizer, 256).requests([request_])


def test_an_empty_document_is_one_line(tokenizer):
    with pytest.raises(InputError, match="no token"):
        Encoder(tokenizer, 256).rolling(["text", ""])


def test_the_window_is_at_most_the_model_s(model):
    assert max_length(model.config, None) == 256
    assert max_length(model.config, 100) == 100
    with pytest.raises(InputError, match=r"evaluation\.window is 257; .* 256"):
        max_length(model.config, 257)
