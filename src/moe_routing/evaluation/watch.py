"""Watch routers during forward passes, without changing anything.

Shape letters: L layers, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_routing.engine.adapters import find_routers, watched
from moe_routing.errors import InputError


class RouterWatch:
    """Router logits and norms of router inputs, layer by layer, on the host.

    Forward passes are appended to each other.
    """

    def __init__(self, layers: int, keep_T: Tensor | None) -> None:
        self._logits: list[list[Tensor]] = [[] for _ in range(layers)]
        self._norms: list[list[Tensor]] = [[] for _ in range(layers)]
        self._choices: list[list[Tensor]] = [[] for _ in range(layers)]
        self._keep_T = keep_T

    def see(
        self, layer: int, hidden_TH: Tensor, logits_TE: Tensor, choice_TE: Tensor | None
    ) -> None:
        """Append what a router read and computed in one forward pass."""
        if self._keep_T is not None:
            keep_T = self._keep_T.to(hidden_TH.device)
            hidden_TH, logits_TE = hidden_TH[keep_T], logits_TE[keep_T]
            choice_TE = None if choice_TE is None else choice_TE[keep_T]
        self._logits[layer].append(logits_TE.float().cpu())
        self._norms[layer].append(hidden_TH.float().norm(dim=1).cpu())
        if choice_TE is not None:
            self._choices[layer].append(choice_TE.cpu())

    def logits_LTE(self, origin: str) -> Tensor:
        """Return router logits, float32, (layers, tokens, experts).

        Raises:
            InputError: a logit is not finite; ``origin`` names what was read.
        """
        logits_LTE = torch.stack([torch.cat(parts) for parts in self._logits])
        finite_L = torch.isfinite(logits_LTE).flatten(1).all(1)
        if not finite_L.all():
            layer = int((~finite_L).nonzero()[0])
            raise InputError(f"{origin}: router logits of layer {layer} are not finite")
        return logits_LTE

    def choice_LTE(self) -> Tensor | None:
        """Return what ranked the experts, float32, (layers, tokens, experts); None: the logits."""
        if not any(self._choices):
            return None
        return torch.stack([torch.cat(parts) for parts in self._choices])

    def norm_LT(self) -> Tensor:
        """Return Euclidean norms of router inputs, float32, (layers, tokens)."""
        return torch.stack([torch.cat(parts) for parts in self._norms])


@contextmanager
def watch_routers(model: PreTrainedModel, keep_T: Tensor | None = None) -> Iterator[RouterWatch]:
    """Watch the routers of a model in this thread's forward passes inside the context.

    Args:
        model: the model, stock or routed.
        keep_T: which tokens of a pass to keep, bool; None keeps all.
    """
    watch = RouterWatch(len(find_routers(model)), keep_T)
    with watched(model, watch.see):
        yield watch
