"""The outputs of all experts of a layer, not weighted.

Shape letters: T tokens, E experts, H hidden size, I expert size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_routing.engine.experts import Weights, activate, right_hand_weights, tensor_names
from moe_routing.engine.module_types import Experts
from moe_routing.engine.offload import own_tensors
from moe_routing.engine.upcast import wide_dtype

CHUNK = 128
"""Tokens at once: outputs of a small model stay in the cache, reading the weights of a large one is
amortised. Outputs of 64 experts of width 2,048 take 64 MB."""


@dataclass(frozen=True)
class DenseExperts:
    """The experts of a layer with their weights in float32 or better, on the device they run on.

    Attributes:
        module: the experts.
        weights: their weights as right-hand factors.
    """

    module: Experts
    weights: Weights

    @classmethod
    def load(cls, module: Experts) -> DenseExperts:
        """Load the weights of experts, also those that accelerate has offloaded.

        Raises:
            InputError: weights without values; see also :func:`right_hand_weights`.
        """
        own = own_tensors(module)
        tensors = [own[name] for name in tensor_names(module)]
        dtype = wide_dtype(tensors[0].dtype)
        return cls(module, right_hand_weights(module, [tensor.to(dtype) for tensor in tensors]))

    def inputs(self, hidden_TH: Tensor) -> Tensor:
        """Return hidden states on the device and in the dtype of the weights."""
        return hidden_TH.to(self.weights.down_EIH)

    def mean_output(self, hidden_TH: Tensor) -> Tensor:
        """Return the mean output of each expert over tokens, (experts, hidden).

        Args:
            hidden_TH: what the layer's router reads, in any dtype and on any device.
        """
        # The down projection is linear, so the mean passes through it once.
        sums = (inner_ETI.sum(1, dtype=torch.float64) for inner_ETI in self._inner(hidden_TH))
        mean_EI = functools.reduce(torch.add, sums) / len(hidden_TH)
        mean_EH = torch.einsum("ei,eih->eh", self.inputs(mean_EI), self.weights.down_EIH)
        bias_EH = self.weights.down_bias_EH
        return mean_EH if bias_EH is None else mean_EH + bias_EH

    def outputs(self, hidden_TH: Tensor) -> Iterator[Tensor]:
        """Yield the outputs of all experts for some tokens at a time, (E, T, H)."""
        for inner_ETI in self._inner(hidden_TH):
            out_ETH, bias_EH = inner_ETI @ self.weights.down_EIH, self.weights.down_bias_EH
            yield out_ETH if bias_EH is None else out_ETH + bias_EH[:, None]

    def norms(self, hidden_TH: Tensor, mean_EH: Tensor) -> tuple[Tensor, Tensor]:
        """Return |o| and |o - mean| of all experts' outputs o, (tokens, experts).

        Args:
            hidden_TH: what the layer's router reads, in any dtype and on any device.
            mean_EH: mean output of each expert.
        """
        mean_E1H = self.inputs(mean_EH)[:, None]
        pairs = [
            (out_ETH.norm(dim=2).T, out_ETH.sub_(mean_E1H).norm(dim=2).T)
            for out_ETH in self.outputs(hidden_TH)
        ]
        norm_TE, deviation_TE = (torch.cat(part) for part in zip(*pairs, strict=True))
        return norm_TE, deviation_TE

    def _inner(self, hidden_TH: Tensor) -> Iterator[Tensor]:
        """Yield what the down projections of all experts read, (E, T, I)."""
        for part_TH in self.inputs(hidden_TH).split(CHUNK):
            up_ETI = part_TH.expand(self.module.num_experts, -1, -1) @ self.weights.up_EHI
            bias_EI = self.weights.up_bias_EI
            if bias_EI is not None:
                up_ETI = up_ETI + bias_EI[:, None]
            yield activate(self.module, up_ETI)
