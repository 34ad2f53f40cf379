"""Attention for packed requests, registered in the attention interface of transformers.

Each tree of a pack attends to itself: its trunk causally, every branch to the trunk and causally
to itself. On the CPU trees are slices of the flat row, one call each, nothing padded or copied;
on an accelerator they are padded to one batch, because there a call costs more than padding.

Shape letters: T tokens, B trees, L longest tree, Q branch tokens, K trunk and branch tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_routing.evaluation.packing import Span

ATTENTION_IMPLEMENTATION = "packed"


class Layout:
    """Which tokens of a pack attend to which, made once for all layers."""

    def __init__(
        self, spans: tuple[Span, ...], dtype: torch.dtype, device: torch.device, *, padded: bool
    ) -> None:
        """Build the masks.

        Args:
            spans: the trees of the pack.
            dtype: the model's dtype; masks are added to attention scores.
            device: where the model runs.
            padded: one padded batch, instead of one call a tree.
        """
        self.spans = spans
        self.padded = padded
        branched = any(span.end > span.fork for span in spans)
        if not padded:
            self.masks = [_branch_mask(span).to(device, dtype) for span in spans]
            return
        longest = max(span.end - span.start for span in spans)
        lengths_B1 = torch.tensor([[span.end - span.start] for span in spans])
        starts_B1 = torch.tensor([[span.start] for span in spans])
        offset_L = torch.arange(longest)
        real_BL = offset_L < lengths_B1
        self.gather_BL = (starts_B1 + offset_L).where(real_BL, 0).to(device)
        self.scatter_T = real_BL.reshape(-1).nonzero()[:, 0].to(device)
        self.mask_BLL = _tree_masks(spans, longest).to(device, dtype) if branched else None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return attention outputs (1, T, heads, d) for inputs (1, heads, T, d)."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        if self.padded:
            return self._attend_padded(query, key, value, scaling)
        return self._attend_slices(query, key, value, scaling)

    def _attend_slices(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        out = torch.empty_like(query.transpose(1, 2))
        for span, mask_QK in zip(self.spans, self.masks, strict=True):
            trunk, branch = slice(span.start, span.fork), slice(span.fork, span.end)
            part = F.scaled_dot_product_attention(
                query[:, :, trunk], key[:, :, trunk], value[:, :, trunk],
                is_causal=True, scale=scaling,
            )  # fmt: skip
            out[:, trunk] = part.transpose(1, 2)
            if span.end > span.fork:
                tree = slice(span.start, span.end)
                part = F.scaled_dot_product_attention(
                    query[:, :, branch], key[:, :, tree], value[:, :, tree],
                    attn_mask=mask_QK, scale=scaling,
                )  # fmt: skip
                out[:, branch] = part.transpose(1, 2)
        return out

    def _attend_padded(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        gather_BL = self.gather_BL.to(query.device)
        parts = [part[0].transpose(0, 1)[gather_BL].transpose(1, 2) for part in (query, key, value)]
        mask = None if self.mask_BLL is None else self.mask_BLL[:, None].to(query.device)
        out = F.scaled_dot_product_attention(
            *parts, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        rows = out.transpose(1, 2).flatten(0, 1)
        return rows[self.scatter_T.to(query.device)][None]


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend within each tree of a pack.

    Args:
        module: the attention module; unused.
        query: (1, heads, T, d).
        key: (1, key heads, T, d).
        value: (1, key heads, T, d).
        attention_mask: unused; the layout says who attends to whom.
        scaling: factor of the scores.
        dropout: unused; packs are scored, never trained on.
        layout: of the pack, given to the model's forward by keyword.
        **kwargs: what other implementations need.

    Returns:
        Outputs (1, T, heads, d), and None for the attention weights.
    """
    if layout is None:
        raise TypeError("packed attention needs the keyword argument layout")
    return layout.attend(query, key, value, scaling), None


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use packed attention inside the context; restore the model's own on leaving."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _branch_mask(span: Span) -> Tensor:
    """Return scores to add, (branch tokens, tree tokens): 0 where seen, else minus infinity."""
    tokens = span.end - span.start
    return _additive(_visible(span, tokens)[span.fork - span.start :])


def _tree_masks(spans: tuple[Span, ...], longest: int) -> Tensor:
    return torch.stack([_additive(_visible(span, longest)) for span in spans])


def _visible(span: Span, length: int) -> np.ndarray:
    """Return who sees whom, (length, length); padding sees its past, so that no row is empty."""
    visible = np.tri(length, dtype=bool)
    starts = span.fork - span.start + np.cumsum([0, *span.branches])
    for begin, end in pairwise(starts):
        visible[begin:end, starts[0] : begin] = False
    return visible


def _additive(visible: np.ndarray) -> Tensor:
    hidden = torch.from_numpy(~visible)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_IMPLEMENTATION, packed_attention_forward)
