"""Two ways to run a model on requests: packed, or by the model's own plain forward pass.

Shape letters: T tokens of a packed batch, N scored positions, B requests, S positions, K positions
whose logits are kept, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_routing.engine.attention import (
    Layout,
    PaddedLayout,
    SlicedLayout,
    check_free,
    packed_attention,
)
from moe_routing.engine.head import (
    logit_log_likelihoods,
    logits_of,
    plain_head,
    target_log_likelihoods,
)
from moe_routing.engine.kernels import fused_cpu_kernels
from moe_routing.engine.offload import input_device
from moe_routing.engine.packing import PackedBatch, PrefixGroup, balance, fill_equal
from moe_routing.engine.requests import TokenRequest

LOGIT_ROWS = 2048
"""Most rows of logits over the whole vocabulary at once, in plain forward passes."""


class Runner(Protocol):
    """A way to run a model on requests."""

    concurrent: bool
    """Whether several batches may run at once."""

    def prepared(self) -> AbstractContextManager[None]:
        """Prepare the model inside the context."""
        ...

    def divide(
        self,
        groups: Sequence[PrefixGroup],
        requests: Sequence[TokenRequest],
        budget: int,
        workers: int,
    ) -> list[list[PrefixGroup]]:
        """Divide prefix groups into batches of at most ``budget`` tokens."""
        ...

    def states(self, batch: PackedBatch) -> Tensor:
        """Return the final hidden states at the scored positions, (N, H)."""
        ...

    def likelihoods(
        self, batch: PackedBatch, greedy: bool, states_NH: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-likelihood of each target, (N,), and whether it is the most likely.

        Args:
            batch: the batch.
            greedy: whether to report the latter.
            states_NH: what :meth:`states` returned of the batch; None runs the model.
        """
        ...


class Packed:
    """One row of tokens without padding, for models :mod:`moe_routing.engine.packable` allows."""

    concurrent = True

    def __init__(self, model: PreTrainedModel, padded: bool | None) -> None:
        """Keep the model; if ``padded`` is None, the device decides whether attention pads."""
        self.model = model
        pads = input_device(model).type != "cpu" if padded is None else padded
        self.layout: Callable[..., Layout] = PaddedLayout if pads else SlicedLayout
        self._head: nn.Linear | None = None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Replace attention and CPU kernels inside the context.

        Raises:
            InputError: they are replaced already.
        """
        self._head = plain_head(self.model)
        with packed_attention(self.model), fused_cpu_kernels(self.model):
            yield

    def divide(
        self,
        groups: Sequence[PrefixGroup],
        requests: Sequence[TokenRequest],
        budget: int,
        workers: int,
    ) -> list[list[PrefixGroup]]:
        """Return batches of similar size."""
        return balance(groups, budget, workers)

    def states(self, batch: PackedBatch) -> Tensor:
        """Return the final hidden states at the scored positions, (N, H)."""
        device = input_device(self.model)
        hidden_TH = self.model.base_model(
            input_ids=torch.from_numpy(batch.ids_T)[None].to(device),
            position_ids=torch.from_numpy(batch.position_T)[None].to(device),
            use_cache=False,
            layout=self.layout(batch.spans, self.model.dtype, device),
        ).last_hidden_state[0]
        return hidden_TH.index_select(0, torch.from_numpy(batch.scored_N).to(hidden_TH.device))

    def likelihoods(
        self, batch: PackedBatch, greedy: bool, states_NH: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-likelihood of each target, (N,), and whether it is the most likely."""
        hidden_NH = self.states(batch) if states_NH is None else states_NH
        if self._head is None:
            return self._by_own_head(hidden_NH, torch.from_numpy(batch.target_N), greedy)
        hidden_NH = hidden_NH.to(self._head.weight.device)
        target_N = torch.from_numpy(batch.target_N).to(hidden_NH.device)
        return target_log_likelihoods(self._head, hidden_NH, target_N, greedy=greedy)

    def _by_own_head(
        self, hidden_NH: Tensor, target_N: Tensor, greedy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute logits as the model does: with scales, caps, adapters and hooks."""
        likelihoods, best = [], []
        for hidden_CH, target_C in zip(
            hidden_NH.split(LOGIT_ROWS), target_N.split(LOGIT_ROWS), strict=True
        ):
            logits_CV = logits_of(self.model, hidden_CH)
            likelihood_C, best_C = logit_log_likelihoods(
                logits_CV, target_C.to(logits_CV.device), greedy=greedy
            )
            likelihoods.append(likelihood_C)
            best.append(best_C)
        return torch.cat(likelihoods), torch.cat(best) if greedy else None


class Plain:
    """The model's own forward pass over requests of equal length; correct for every model."""

    concurrent = False

    def __init__(self, model: PreTrainedModel) -> None:
        """Keep the model."""
        self.model = model

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Leave the model as it is.

        Raises:
            InputError: the model uses packed attention.
        """
        check_free(self.model)
        yield

    def divide(
        self,
        groups: Sequence[PrefixGroup],
        requests: Sequence[TokenRequest],
        budget: int,
        workers: int,
    ) -> list[list[PrefixGroup]]:
        """Return batches of requests of equal length."""
        targets = [len(request.target_ids) for request in requests]
        return fill_equal(groups, targets, budget, LOGIT_ROWS)

    def states(self, batch: PackedBatch) -> Tensor:
        """Return the final hidden states at the scored positions, (N, H)."""
        hidden_BSH = self.model.base_model(self._ids(batch), use_cache=False).last_hidden_state
        scored_N = torch.from_numpy(batch.scored_N).to(hidden_BSH.device)
        return hidden_BSH.flatten(0, 1).index_select(0, scored_N)

    def likelihoods(
        self, batch: PackedBatch, greedy: bool, states_NH: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-likelihood of each target, (N,), and whether it is the most likely."""
        logits_NV = self._logits(batch) if states_NH is None else logits_of(self.model, states_NH)
        target_N = torch.from_numpy(batch.target_N).to(logits_NV.device)
        return logit_log_likelihoods(logits_NV, target_N, greedy=greedy)

    def _logits(self, batch: PackedBatch) -> Tensor:
        """Return the logits at the scored positions; a request's targets are its last tokens."""
        ids_BS = self._ids(batch)
        length = kept = ids_BS.shape[1]
        options = {}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            kept = options["logits_to_keep"] = int(batch.targets.max())
        logits_BKV = self.model(ids_BS, use_cache=False, **options).logits
        row_N, position_N = np.divmod(batch.scored_N, length)
        kept_N = torch.from_numpy(row_N * kept + position_N - (length - kept))
        return logits_BKV.flatten(0, 1).index_select(0, kept_N.to(logits_BKV.device))

    def _ids(self, batch: PackedBatch) -> Tensor:
        """Return a batch's token ids, (B, S), on the device that takes the model's inputs."""
        reset_rope(self.model)
        ids_T = torch.from_numpy(batch.ids_T).to(input_device(self.model))
        return ids_T.view(len(batch.members), -1)


@torch.inference_mode()
def reset_rope(model: PreTrainedModel) -> None:
    """Reset dynamic rotary embeddings, which grow with the longest sequence seen."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            device = cast("Tensor", module.inv_freq).device
            first = torch.zeros(1, 1, dtype=torch.int64, device=device)
            module(first.float(), position_ids=first)


def out_of_memory(error: Exception) -> bool:
    """Say whether memory ran out; on the CPU only the message of torch's error shows it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
