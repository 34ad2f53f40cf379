"""Requests and their tokens, by the rules of lm-evaluation-harness (``TemplateLM``, ``HFLM``).

A request is a text that is read (context) and a text that is scored (continuation). Where the
harness fails with an assertion, :class:`moe_routing.errors.InputError` is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from moe_routing.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_PREFIX = "the tokenizer has neither a bos nor an eos token; allowed: one with either of them"


@dataclass(frozen=True)
class Request:
    """A text to score, and the text before it.

    Attributes:
        context: text that is read; empty for none.
        continuation: text whose tokens are scored, with the white space before it.
    """

    context: str
    continuation: str


@dataclass(frozen=True)
class TokenRequest:
    """A request as tokens: the last ``len(target_ids)`` inputs predict ``target_ids``."""

    input_ids: list[int]
    target_ids: list[int]


class Encoder:
    """Turns text into token requests of at most ``max_length`` inputs."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int = 1000
    ) -> None:
        """Keep the tokenizer.

        Args:
            tokenizer: its beginning-of-sequence token, or else its end-of-sequence token, replaces
                an empty context; tokens that it puts at the end of every text are left out.
            max_length: most input tokens of a request; longer ones are truncated from the left.
            batch_size: texts per call of the tokenizer.

        Raises:
            InputError: the tokenizer has neither token.
        """
        prefix = tokenizer.bos_token_id
        prefix = cast("int | None", tokenizer.eos_token_id if prefix is None else prefix)
        if prefix is None:
            raise InputError(NO_PREFIX)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.prefix_token = int(prefix)
        self._prefix_text = cast("str", tokenizer.decode(prefix))
        self._batch_size = batch_size

    def requests(self, requests: Sequence[Request]) -> list[TokenRequest]:
        """Return the token requests, in order.

        Spaces at the end of a context move to the continuation. Context and continuation are
        tokenised as one text and split at the length of the context alone; the prefix token
        replaces an empty context.

        Raises:
            InputError: a continuation has no token, or more than ``max_length``.
        """
        split = [_move_spaces(request) for request in requests]
        bare = [index for index, request in enumerate(requests) if request.context == ""]
        texts = sorted({context for context, _ in split})
        contexts = dict(zip(texts, self._encode(texts), strict=True))
        whole = self._encode([context + continuation for context, continuation in split])
        bare_ids = self._encode([split[index][1] for index in bare], special=False)
        for index, ids in zip(bare, bare_ids, strict=True):
            whole[index] = ids
        return [
            self._token_request(request, contexts[context] if request.context else [], ids)
            for request, (context, _), ids in zip(requests, split, whole, strict=True)
        ]

    def rolling(self, texts: Sequence[str]) -> list[list[TokenRequest]]:
        """Return, for each text, the windows that predict each of its tokens once.

        The first window starts with the prefix token, every later one with the last token of the
        window before it; the last is filled up with earlier tokens, which are read but not scored
        (``get_rolling_token_windows`` with ``context_len=1``, then ``make_disjoint_window``).

        Raises:
            InputError: a text has no token.
        """
        windows = []
        for text, ids in zip(texts, self._encode(texts), strict=True):
            if not ids:
                raise InputError(f"text {text[:40]!r} has no token; allowed: at least one")
            windows.append(list(self._windows(ids)))
        return windows

    def _windows(self, ids: list[int]) -> Iterator[TokenRequest]:
        read = [self.prefix_token, *ids]
        for start in range(0, len(ids), self.max_length):
            end = min(start + self.max_length, len(ids))
            # The last window is filled up from the left, so that its targets have more context.
            yield TokenRequest(read[max(0, end - self.max_length) : end], ids[start:end])

    def _token_request(
        self, request: Request, context: list[int], whole: list[int]
    ) -> TokenRequest:
        targets = whole[len(context) :]
        if not context:
            # An empty context becomes the prefix token, unless the text starts with it.
            starts_with_it = request.context == "" and targets[:1] == [self.prefix_token]
            context, targets = [self.prefix_token], targets[1:] if starts_with_it else targets
        check_continuation(request.continuation, len(targets), self.max_length)
        # The model reads the context's own tokens, even if the whole text begins with others.
        return TokenRequest((context + targets)[-(self.max_length + 1) :][:-1], targets)

    def _encode(self, texts: Sequence[str], special: bool | None = None) -> list[list[int]]:
        """Tokenise texts; those that start with the prefix token's text get no special tokens."""
        ids: list[list[int]] = []
        appended = appended_tokens(self.tokenizer) if special is None else 0
        for start in range(0, len(texts), self._batch_size):
            batch = list(texts[start : start + self._batch_size])
            options: dict[str, Any] = {} if special is None else {"add_special_tokens": special}
            # Not verbose: texts longer than the model's limit are expected, and cut later.
            encoded = self.tokenizer(batch, return_attention_mask=False, verbose=False, **options)
            ids += [row[: len(row) - appended] for row in encoded["input_ids"]]
        if special is None:
            for index, text in enumerate(texts):
                if text.startswith(self._prefix_text):
                    ids[index] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def appended_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a tokenizer puts at the end of every text.

    Fine-tuning may save one that ends texts with its end token: a context would end before its
    continuation, and the end token would be scored.
    """
    text = "a"
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    starts = range(len(whole) - len(own) + 1)
    start = next((n for n in starts if whole[n : n + len(own)] == own), None)
    return 0 if start is None else len(whole) - len(own) - start


def own_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text that the model goes on from: none is put at its end."""
    ids = tokenizer(text)["input_ids"]
    return ids[: len(ids) - appended_tokens(tokenizer)]


def check_continuation(text: str, tokens: int, longest: int) -> None:
    """Check that a continuation can be scored.

    Args:
        text: the continuation.
        tokens: number of its tokens.
        longest: most input tokens of a request.

    Raises:
        InputError: it has no token, or more than fit into the window.
    """
    if tokens == 0:
        raise InputError(f"continuation {text!r} has no token to score")
    if tokens > longest:
        raise InputError(
            f"continuation {text[:40]!r} has {tokens} tokens; allowed: at most the window of "
            f"{longest}"
        )


def max_length(config: object, window: int | None) -> int:
    """Return the most input tokens of a forward pass.

    Args:
        config: the model's config.
        window: the study's own limit, or None for the model's.

    Raises:
        InputError: the window is longer than the model's positions.
    """
    longest = getattr(config, "max_position_embeddings", None) or 2048
    if window is not None and window > longest:
        raise InputError(f"evaluation.window is {window}; allowed: at most the model's {longest}")
    return window or longest


def _move_spaces(request: Request) -> tuple[str, str]:
    context = request.context.rstrip()
    spaces = request.context[len(context) :]
    return context, spaces + request.continuation
