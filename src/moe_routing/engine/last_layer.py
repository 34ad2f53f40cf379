"""Experts of the last layer for those tokens only whose output is read.

Nothing comes after the last layer that would mix tokens: what its experts add to a token that no
logit is asked of, nobody sees. Its router sees all tokens, so that telemetry stays whole.

Shape letters: T tokens, N tokens that are read, K slots per token, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_routing.engine.adapters import last_experts
from moe_routing.engine.patching import swapped


class Read(threading.local):
    """Which tokens are read of the forward pass that a thread is in; None: all."""

    token_N: Tensor | None = None


@contextmanager
def spared_last_experts(model: PreTrainedModel, read: Read) -> Iterator[None]:
    """Spare the last layer's experts the tokens that are not read, inside the context.

    A model whose last layer has no experts behind a supported router stays as it is.
    """
    experts = last_experts(model)
    if experts is None:
        yield
        return
    with swapped(experts, partial(_forward, read)):
        yield


def _forward(read: Read, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if read.token_N is None:
            return compute(hidden_TH, index_TK, weight_TK)
        token_N = read.token_N.to(hidden_TH.device)
        rows = (rows.index_select(0, token_N) for rows in (hidden_TH, index_TK, weight_TK))
        return torch.zeros_like(hidden_TH).index_copy_(0, token_N, compute(*rows))

    return forward
