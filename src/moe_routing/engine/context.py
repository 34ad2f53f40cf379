"""State of one forward pass that is not among the model's own arguments.

The scorer sets it around each forward pass; the routers, experts and recorders inside read it.
It is held in a context variable, so each of several concurrent forward passes has its own.

Shape letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

Sums = dict[tuple[str, int], Tensor | int]
"""Statistics of forward passes, by name and layer."""


@dataclass
class ForwardContext:
    """State of one forward pass.

    Attributes:
        mask_T: which tokens are real, bool, (batch * sequence,); None if all are. Padding gets no
            experts and is left out of the statistics.
        concurrent: whether other forward passes run on the same processor at the same time.
        sums: where a recorder adds the statistics of this pass; None adds to the recorder's own.
        counts_T: experts of each token summed over layers, float32; filled in by a recorder.
        key_T: a hash of the text up to each token, int64, which random draws of strategies depend
            on; None where the pass did not come with one.
    """

    mask_T: Tensor | None = None
    concurrent: bool = False
    sums: Sums | None = None
    counts_T: Tensor | None = None
    key_T: Tensor | None = None


_DROPPED: ContextVar[Tensor | None] = ContextVar("dropped_weights", default=None)
_CURRENT: ContextVar[ForwardContext | None] = ContextVar("forward_context", default=None)


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[ForwardContext]:
    """Set the state of the forward passes that this thread runs inside the context."""
    token = _CURRENT.set(context)
    try:
        yield context
    finally:
        _CURRENT.reset(token)


def current_context() -> ForwardContext:
    """Return the state of the present forward pass; a default one if none was set."""
    return _CURRENT.get() or ForwardContext()


def pass_dropped_weights(weight_TE: Tensor) -> None:
    """Leave the weights of dropped experts for the experts module of the same layer and thread."""
    _DROPPED.set(weight_TE)


def take_dropped_weights() -> Tensor | None:
    """Return what the router of the layer left, and forget it."""
    weight_TE = _DROPPED.get()
    _DROPPED.set(None)
    return weight_TE
