"""Watch routers during forward passes, without changing anything.

Shape letters: L layers, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_routing.engine.adapters import find_routers
from moe_routing.errors import InputError


class RouterWatch:
    """Router logits and norms of router inputs, layer by layer, on the host.

    Forward passes are appended to each other.
    """

    def __init__(self, layers: int, keep_T: Tensor | None) -> None:
        self._logits: list[list[Tensor]] = [[] for _ in range(layers)]
        self._norms: list[list[Tensor]] = [[] for _ in range(layers)]
        self._keep_T = keep_T

    def hook(self, layer: int) -> Callable[..., None]:
        """Return the forward hook of a layer's router."""

        def append(_: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            hidden_TH, logits_TE = inputs[0].reshape(-1, inputs[0].shape[-1]), output[0]
            if self._keep_T is not None:
                keep_T = self._keep_T.to(hidden_TH.device)
                hidden_TH, logits_TE = hidden_TH[keep_T], logits_TE[keep_T]
            self._logits[layer].append(logits_TE.float().cpu())
            self._norms[layer].append(hidden_TH.float().norm(dim=1).cpu())

        return append

    def logits_LTE(self, origin: str) -> Tensor:
        """Return router logits, float32, (layers, tokens, experts).

        Raises:
            InputError: a logit is not finite; ``origin`` names what was read.
        """
        logits_LTE = torch.stack([torch.cat(parts) for parts in self._logits])
        check_finite_layers(torch.isfinite(logits_LTE).flatten(1).all(1).numpy(), origin)
        return logits_LTE

    def norm_LT(self) -> Tensor:
        """Return Euclidean norms of router inputs, float32, (layers, tokens)."""
        return torch.stack([torch.cat(parts) for parts in self._norms])


@contextmanager
def watch_routers(model: PreTrainedModel, keep_T: Tensor | None = None) -> Iterator[RouterWatch]:
    """Watch the routers of a model in the forward passes of the block.

    Args:
        model: the model, stock or routed.
        keep_T: which tokens of a pass to keep, bool; None keeps all.
    """
    routers = find_routers(model)
    watch = RouterWatch(len(routers), keep_T)
    handles = [r.module.register_forward_hook(watch.hook(r.layer)) for r in routers]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def check_finite_layers(finite_L: NDArray[np.bool_], origin: str) -> None:
    """Check that the router logits of every layer were finite.

    Args:
        finite_L: whether they were, by layer.
        origin: how errors name what was read.

    Raises:
        InputError: naming the first layer with others.
    """
    if not finite_L.all():
        layer = int(np.flatnonzero(~finite_L)[0])
        raise InputError(f"{origin}: router logits of layer {layer} are not finite")
