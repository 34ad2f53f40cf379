"""Attention for packed requests, registered in the attention interface of transformers.

Each prefix group of a packed batch attends to itself only: its prefix causally, every continuation
to the prefix and causally to itself. A layout plans this once for all layers. On the CPU, prefix
groups are slices of the flat row: nothing is padded and little is copied. On an accelerator they
are padded to one batch, because an extra kernel call costs more than padding.

Shape letters: T tokens, B prefix groups, L longest prefix group, Q queries, K keys.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_routing.engine.packing import Span
from moe_routing.errors import InputError

ATTENTION_IMPLEMENTATION = "packed"
QUERY_BLOCK = 64
"""Queries of a prefix per call. Below ``BLOCKWISE_LIMIT`` tokens torch's causal attention computes
the whole square; blocks of queries skip the keys that come after them."""
BLOCKWISE_LIMIT = 512
WITHOUT_EFFECT = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}
"""Arguments of attention functions that have no effect here."""

_LOCK = threading.Lock()


class Layout(Protocol):
    """Which tokens of a batch attend to which."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None = None,
    ) -> Tensor:
        """Return attention outputs (1, T, heads, d) for inputs (1, heads, T, d).

        With a ``window`` a token sees that many tokens, including itself.
        """
        ...


@dataclass(frozen=True)
class Call:
    """One call of the attention kernel, on ``count`` adjacent prefix groups of equal shape.

    Attributes:
        start: flat index of the first group.
        count: number of groups.
        size: number of tokens of each group.
        queries: where the queries lie in a group, (start, end).
        keys: where the keys lie in a group.
        mask_QK: scores to add; None means causal, with queries and keys that start together.
    """

    start: int
    count: int
    size: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    mask_QK: Tensor | None

    def slices(self, rows: Tensor, bounds: tuple[int, int]) -> Tensor:
        """Return a slice of each group: (count, heads, slice, d) of (1, heads, T, d)."""
        first, last = bounds
        if self.count == 1:
            return rows.narrow(2, self.start + first, last - first)
        groups = rows[0, :, self.start : self.start + self.count * self.size]
        return groups.unflatten(1, (self.count, self.size)).transpose(0, 1)[:, :, first:last]


class SlicedLayout:
    """Prefix groups as slices of the flat row."""

    def __init__(self, spans: Sequence[Span], dtype: torch.dtype, device: torch.device) -> None:
        """Keep the spans; masks are in the model's ``dtype`` on its ``device``."""
        self._longest = _longest(spans)
        self._plan = functools.cache(partial(_calls, spans, dtype, device))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None = None,
    ) -> Tensor:
        """Return attention outputs (1, T, heads, d) for inputs (1, heads, T, d)."""
        width = value.shape[-1]
        out = value.new_empty(1, query.shape[2], query.shape[1], width)
        rows = out.transpose(1, 2)
        for call in self._plan(_narrow(window, self._longest)):
            part = F.scaled_dot_product_attention(
                call.slices(query, call.queries),
                call.slices(key, call.keys),
                call.slices(value, call.keys),
                attn_mask=call.mask_QK,
                is_causal=call.mask_QK is None,
                scale=scaling,
            )
            call.slices(rows, call.queries).copy_(part)
        return out


def _calls(
    spans: Sequence[Span], dtype: torch.dtype, device: torch.device, window: int | None
) -> list[Call]:
    """Plan the calls of the attention kernel."""
    masks: dict[tuple[int, int], Tensor] = {}
    calls: list[Call] = []
    for _, same in groupby(spans, key=lambda span: (span.left, span.prefix, span.right)):
        equal = list(same)
        span, size = equal[0], equal[0].size
        start = sum(span.left)
        end = start + span.prefix
        parts: list[tuple[tuple[int, int], tuple[int, int], Tensor | None]] = []
        for first, last in _blocks(span.prefix):
            oldest = 0 if window is None else max(0, first - window + 1)
            causal = first == 0 and (window is None or last <= window)
            if not causal and (first, last) not in masks:
                visible = np.tri(last - first, last - oldest, first - oldest, dtype=bool)
                if window is not None:
                    visible &= ~np.tri(*visible.shape, first - oldest - window, dtype=bool)
                masks[first, last] = _hide(visible).to(device, dtype)
            mask = None if causal else masks[first, last]
            parts.append(((start + first, start + last), (start + oldest, start + last), mask))
        if span.prefix < size:
            visible = _visible(span, size, window)
            # Continuations on one side of the prefix never see those on the other side.
            for queries, keys in (((0, start), (0, end)), ((end, size), (start, size))):
                if queries[0] < queries[1]:
                    mask = _hide(visible[slice(*queries), slice(*keys)]).to(device, dtype)
                    parts.append((queries, keys, mask))
        # Equal groups without continuations are one batch: their parts are evenly spaced.
        batches = [equal] if span.prefix == size else [[span] for span in equal]
        for batch in batches:
            calls += [Call(batch[0].start, len(batch), size, *part) for part in parts]
    return calls


class PaddedLayout:
    """Prefix groups padded to one batch."""

    def __init__(self, spans: Sequence[Span], dtype: torch.dtype, device: torch.device) -> None:
        """Plan the batch; masks are in the model's ``dtype`` on its ``device``."""
        self._longest = _longest(spans)
        starts_B1 = torch.tensor([[span.start] for span in spans])
        sizes_B1 = torch.tensor([[span.size] for span in spans])
        index_L = torch.arange(int(sizes_B1.max()))
        real_BL = index_L < sizes_B1
        self.gather_BL = (starts_B1 + index_L).where(real_BL, 0).to(device)
        self.scatter_T = real_BL.reshape(-1).nonzero()[:, 0].to(device)
        self._mask = functools.cache(partial(_padded_mask, spans, dtype, device))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None = None,
    ) -> Tensor:
        """Return attention outputs (1, T, heads, d) for inputs (1, heads, T, d)."""
        # The layers of a model may be on several devices; the plan follows the inputs.
        gather_BL = self.gather_BL.to(query.device)
        parts = [rows[0].transpose(0, 1)[gather_BL].transpose(1, 2) for rows in (query, key, value)]
        mask_BLL = self._mask(_narrow(window, self._longest))
        mask = None if mask_BLL is None else mask_BLL[:, None].to(query.device)
        out = F.scaled_dot_product_attention(
            *parts, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        return out.transpose(1, 2).flatten(0, 1)[self.scatter_T.to(query.device)][None]


def _padded_mask(
    spans: Sequence[Span], dtype: torch.dtype, device: torch.device, window: int | None
) -> Tensor | None:
    """Return scores to add, (B, L, L); None if attention is causal."""
    if window is None and all(span.size == span.prefix for span in spans):
        return None
    longest = max(span.size for span in spans)
    return _hide(np.stack([_visible(span, longest, window) for span in spans])).to(device, dtype)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend within each prefix group of a packed batch.

    Args:
        module: the attention module.
        query: (1, heads, T, d).
        key: (1, key heads, T, d).
        value: (1, key heads, T, d).
        attention_mask: must be None; the layout defines which tokens attend to which.
        scaling: factor of the scores.
        dropout: unused; packed batches are scored, never trained on.
        layout: the layout of the packed batch, a keyword argument of the model's forward.
        sliding_window: number of tokens that a token sees.
        **kwargs: arguments of other implementations that have no effect here.

    Returns:
        Outputs (1, T, heads, d), and None for the attention weights.

    Raises:
        TypeError: no layout, or an argument that would change the outputs.
    """
    if layout is None:
        raise TypeError("packed attention needs the keyword argument layout")
    given = {**kwargs, "attention_mask": attention_mask}
    unknown = [name for name in given.keys() - WITHOUT_EFFECT if given[name] is not None]
    if unknown:
        raise TypeError(f"packed attention does not know what to do with {', '.join(unknown)}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (rows.repeat_interleave(groups, dim=1) for rows in (key, value))
    return layout.attend(query, key, value, scaling, sliding_window or _own_window(module)), None


def _own_window(module: nn.Module) -> int | None:
    """Return the window of an attention module that leaves it to the mask; None if it has none."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    if kinds and layer is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(module, "sliding_window", None)


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use packed attention inside the context; restore the model's own on leaving.

    Raises:
        InputError: it is in use already, by this model or one that shares its config.
    """
    with _LOCK:
        check_free(model)
        before = cast("str", model.config._attn_implementation)  # a built model has one
        model.set_attn_implementation(ATTENTION_IMPLEMENTATION)
    try:
        yield
    finally:
        with _LOCK:
            model.set_attn_implementation(before)


def check_free(model: PreTrainedModel) -> None:
    """Check that a model does not use packed attention.

    Raises:
        InputError: it does, or a model that shares its config does.
    """
    if model.config._attn_implementation == ATTENTION_IMPLEMENTATION:
        raise InputError(
            "the model is being scored already, or one with the same config object; allowed: one "
            "call after the other, or models of their own"
        )


def _narrow(window: int | None, longest: int) -> int | None:
    """Return a window that makes a difference to requests of at most ``longest`` tokens."""
    return window if window and window < longest else None


def _longest(spans: Sequence[Span]) -> int:
    return max(span.prefix + max((*span.left, *span.right), default=0) for span in spans)


def _blocks(prefix: int) -> Iterator[tuple[int, int]]:
    """Return the blocks of a prefix's queries, one per call."""
    blocks = prefix // QUERY_BLOCK if prefix <= BLOCKWISE_LIMIT else 1
    step = -(-prefix // max(1, blocks))
    return ((first, min(first + step, prefix)) for first in range(0, prefix, step))


def _visible(span: Span, length: int, window: int | None) -> np.ndarray:
    """Return what each token sees, (length, length); padding sees some: no row is empty."""
    padding = length - span.size
    prefix = len(span.left)
    part_L = np.repeat(np.arange(len(span.parts) + 1), [*span.parts, padding])
    own = (part_L[:, None] == part_L) & np.tri(length, dtype=bool)
    visible = own | (part_L == prefix) & (part_L != prefix)[:, None]
    if window is not None:
        starts = [0 if part == prefix else span.prefix for part in range(len(span.parts) + 1)]
        offsets = [np.arange(size) for size in (*span.parts, padding)]
        position_L = np.concatenate([s + o for s, o in zip(starts, offsets, strict=True)])
        visible &= position_L[:, None] - position_L < window
    return visible


def _hide(visible: np.ndarray) -> Tensor:
    """Return scores to add: 0 where visible, else minus infinity."""
    return torch.from_numpy(np.where(visible, np.float32(0), np.float32(-np.inf)))


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_IMPLEMENTATION, packed_attention_forward)
