"""The two ways to run a model on requests: packed, and by its own plain forward pass.

Shape letters: T tokens of a pack, N scored positions, B requests, S positions, K positions whose
logits are kept, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_routing.engine.attention import (
    PaddedLayout,
    SlicedLayout,
    check_free,
    packed_attention,
)
from moe_routing.engine.head import logit_log_likelihoods, target_log_likelihoods
from moe_routing.engine.kernels import lean_kernels
from moe_routing.engine.last_layer import Read, spared_last_experts
from moe_routing.engine.offload import input_device
from moe_routing.engine.packable import reset_rope
from moe_routing.engine.packing import Pack, Tree, fill_equal, spread
from moe_routing.engine.requests import TokenRequest

LOGIT_ROWS = 2048
"""Most rows of logits of the whole vocabulary at once, in plain forward passes."""


class Way(Protocol):
    """A way to run a model on requests."""

    at_once: bool
    """Whether several packs may be in work at once."""

    def prepared(self) -> Iterator[None]:
        """Prepare the model inside the context."""
        ...

    def divide(
        self, trees: Sequence[Tree], requests: Sequence[TokenRequest], budget: int, workers: int
    ) -> list[list[Tree]]:
        """Divide trees into packs of at most ``budget`` tokens."""
        ...

    def states(self, pack: Pack) -> Tensor:
        """Return the final hidden states at a pack's scored positions, (N, H)."""
        ...

    def likelihoods(self, pack: Pack, greedy: bool) -> tuple[Tensor, Tensor | None]:
        """Return the log-likelihood of each target, (N,), and whether it is the most likely."""
        ...


class Packed:
    """One row of tokens without padding; for what :mod:`moe_routing.engine.packable` allows."""

    at_once = True

    def __init__(self, model: PreTrainedModel, padded: bool | None) -> None:
        """Keep the model; ``padded`` attention is decided by device if None."""
        self.model = model
        self._padded = model.device.type != "cpu" if padded is None else padded
        self._read = Read()

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Replace attention, kernels and the last layer's experts inside the context.

        Raises:
            InputError: they are replaced already.
        """
        with (
            packed_attention(self.model),
            lean_kernels(self.model),
            spared_last_experts(self.model, self._read),
        ):
            yield

    def divide(
        self, trees: Sequence[Tree], requests: Sequence[TokenRequest], budget: int, workers: int
    ) -> list[list[Tree]]:
        """Return packs of much the same size."""
        return spread(trees, budget, workers)

    def states(self, pack: Pack) -> Tensor:
        """Return the final hidden states at a pack's scored positions, (N, H)."""
        device = self.model.device
        plan = PaddedLayout if self._padded else SlicedLayout
        read_N = np.unique(pack.scored_N)  # requests that fork at a token read it together
        self._read.token_N = torch.from_numpy(read_N) if read_N.size < pack.ids_T.size else None
        hidden_TH = self.model.base_model(
            input_ids=torch.from_numpy(pack.ids_T)[None].to(device),
            position_ids=torch.from_numpy(pack.position_T)[None].to(device),
            use_cache=False,
            layout=plan(pack.spans, self.model.dtype, device),
        ).last_hidden_state[0]
        return hidden_TH.index_select(0, torch.from_numpy(pack.scored_N).to(hidden_TH.device))

    def likelihoods(self, pack: Pack, greedy: bool) -> tuple[Tensor, Tensor | None]:
        """Return the log-likelihood of each target, (N,), and whether it is the most likely."""
        head = self.model.get_output_embeddings()
        hidden_NH = self.states(pack).to(head.weight.device)
        target_N = torch.from_numpy(pack.target_N).to(hidden_NH.device)
        return target_log_likelihoods(head, hidden_NH, target_N, greedy=greedy)


class Plain:
    """The model's own forward pass over requests of one length: right for every model."""

    at_once = False

    def __init__(self, model: PreTrainedModel) -> None:
        """Keep the model."""
        self.model = model

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Leave the model as it is.

        Raises:
            InputError: it is being packed for.
        """
        check_free(self.model)
        yield

    def divide(
        self, trees: Sequence[Tree], requests: Sequence[TokenRequest], budget: int, workers: int
    ) -> list[list[Tree]]:
        """Return packs of requests of one length."""
        targets = [len(request.target_ids) for request in requests]
        return fill_equal(trees, targets, budget, LOGIT_ROWS)

    def states(self, pack: Pack) -> Tensor:
        """Return the final hidden states at a pack's scored positions, (N, H)."""
        hidden_BSH = self.model.base_model(self._ids(pack), use_cache=False).last_hidden_state
        scored_N = torch.from_numpy(pack.scored_N).to(hidden_BSH.device)
        return hidden_BSH.flatten(0, 1).index_select(0, scored_N)

    def likelihoods(self, pack: Pack, greedy: bool) -> tuple[Tensor, Tensor | None]:
        """Return the log-likelihood of each target, (N,), and whether it is the most likely."""
        logits_NV = self._logits(pack)
        target_N = torch.from_numpy(pack.target_N).to(logits_NV.device)
        return logit_log_likelihoods(logits_NV, target_N, greedy=greedy)

    def _logits(self, pack: Pack) -> Tensor:
        """Return the logits at a pack's scored positions; targets are the last of a request."""
        ids_BS = self._ids(pack)
        length = kept = ids_BS.shape[1]
        options = {}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            kept = options["logits_to_keep"] = int(pack.targets.max())
        logits_BKV = self.model(ids_BS, use_cache=False, **options).logits
        row_N, place_N = np.divmod(pack.scored_N, length)
        kept_N = torch.from_numpy(row_N * kept + place_N - (length - kept))
        return logits_BKV.flatten(0, 1).index_select(0, kept_N.to(logits_BKV.device))

    def _ids(self, pack: Pack) -> Tensor:
        """Return a pack's token ids, (B, S), where the model takes them."""
        reset_rope(self.model)
        ids_T = torch.from_numpy(pack.ids_T).to(input_device(self.model))
        return ids_T.view(len(pack.members), -1)
