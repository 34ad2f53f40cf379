"""Routing telemetry: summed where the model runs, copied once.

Shape letters: L layers, T tokens, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_routing.routing.types import Routing


@dataclass(frozen=True)
class RoutingStatistics:
    """What a recorder saw, by layer. A decision is the routing of one token in one layer.

    Attributes:
        tokens: number of tokens.
        forwards: number of forward passes.
        count_histogram_LC: decisions with C = 0 ... E experts, (layers, experts + 1).
        load_LE: decisions that selected each expert, (layers, experts).
        entropy_L: mean entropy of the router's softmax, nats.
        max_probability_L: mean largest softmax probability.
        selected_mass_L: mean softmax mass of the selected experts.
        floor_binds_L: share of decisions raised to the floor of the rule.
        cap_binds_L: share of decisions cut at the cap of the rule.
        empty_L: share of decisions for which the rule itself chose no expert.
        unique_experts_L: mean number of distinct experts in a forward pass.
    """

    tokens: int
    forwards: int
    count_histogram_LC: np.ndarray
    load_LE: np.ndarray
    entropy_L: np.ndarray
    max_probability_L: np.ndarray
    selected_mass_L: np.ndarray
    floor_binds_L: np.ndarray
    cap_binds_L: np.ndarray
    empty_L: np.ndarray
    unique_experts_L: np.ndarray

    def mean_experts_L(self) -> np.ndarray:
        """Mean experts of a decision, by layer."""
        counts_C = np.arange(self.count_histogram_LC.shape[1])
        return self.count_histogram_LC @ counts_C / max(1, self.tokens)

    def mean_experts(self) -> float:
        """Mean experts over all decisions."""
        return float(self.mean_experts_L().mean())

    def sd_experts(self) -> float:
        """Standard deviation of the number of experts over all decisions."""
        share_C = self.count_histogram_LC.sum(0) / max(1, self.count_histogram_LC.sum())
        counts_C = np.arange(share_C.size)
        mean = float(share_C @ counts_C)
        return float(np.sqrt(share_C @ (counts_C - mean) ** 2))

    def by_layer(self) -> dict[str, list]:
        """Return plain lists by layer, for JSON."""
        fields = (
            "count_histogram_LC", "load_LE", "entropy_L", "max_probability_L", "selected_mass_L",
            "floor_binds_L", "cap_binds_L", "empty_L", "unique_experts_L",
        )  # fmt: skip
        rows = {name.rsplit("_", 1)[0]: getattr(self, name).tolist() for name in fields}
        return {"mean_experts": self.mean_experts_L().tolist(), **rows}


def entropy(probability_TE: Tensor) -> Tensor:
    """Return each row's entropy in nats, (tokens,): ``special.entr`` summed, in a quarter the time.

    Args:
        probability_TE: float32, (tokens, experts).
    """
    # A probability of 0 adds 0 times the logarithm of the smallest number: 0.
    tiny = torch.finfo(probability_TE.dtype).tiny
    return probability_TE.clamp_min(tiny).log_().mul_(probability_TE).sum(1).neg_()


class Recorder:
    """Sums routing statistics over forward passes, on the device of each layer."""

    SUMS = ("entropy", "max_probability", "selected_mass", "floor_binds", "cap_binds", "empty")

    def __init__(self) -> None:
        """Start empty."""
        self.forwards = 0
        self.mask_T: Tensor | None = None
        self.counts_T: Tensor | None = None
        self._histogram: dict[int, Tensor] = {}
        self._load: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._unique: dict[int, Tensor] = {}

    @contextmanager
    def tokens(self, mask_T: Tensor) -> Iterator[None]:
        """Say which tokens of the next forward are real.

        Padding gets no experts and is left out of the statistics. After the forward, ``counts_T``
        holds each token's selected experts summed over layers, float32, (batch * sequence,).
        """
        self.mask_T, self.counts_T = mask_T.reshape(-1), None
        try:
            yield
        finally:
            self.mask_T = None

    def add(self, layer: int, routing: Routing, floor: int, cap: int) -> None:
        """Add the routing of one layer in one forward pass."""
        probability_TE, selection = routing.probability_TE, routing.selection
        experts = probability_TE.shape[1]
        count_T, rejected_T = selection.count_T, selection.rejected_T
        index_TK = selection.index_TK
        chosen_TK = probability_TE.gather(1, index_TK.clamp(max=experts - 1))
        rows = torch.stack([
            entropy(probability_TE),
            probability_TE.amax(1),
            chosen_TK.masked_fill(index_TK >= experts, 0.0).sum(1),
            (rejected_T < floor).float(),
            (rejected_T > cap).float(),
            (rejected_T == 0).float(),
        ])  # fmt: skip
        ids = index_TK.reshape(-1)
        if self.mask_T is None:
            keep_T = torch.ones_like(count_T, dtype=torch.bool)
        else:
            keep_T = self.mask_T.to(count_T.device)
            rows = rows.where(keep_T, 0.0)
            ids = index_TK.masked_fill(~keep_T[:, None], experts).reshape(-1)
            count_T = count_T.where(keep_T, experts + 1)
        self._accumulate(self._sums, layer, rows.double().sum(1))
        histogram = torch.bincount(count_T, minlength=experts + 2)[: experts + 1]
        self._accumulate(self._histogram, layer, histogram)
        load_E = torch.bincount(ids, minlength=experts + 1)[:experts]
        self._accumulate(self._load, layer, load_E)
        self._accumulate(self._unique, layer, (load_E > 0).sum())
        self._count(layer, selection.count_T, keep_T)

    def _count(self, layer: int, count_T: Tensor, keep_T: Tensor) -> None:
        if layer == 0:
            self.forwards += 1
            self.counts_T = torch.zeros_like(count_T, dtype=torch.float32)
        here_T = (count_T * keep_T).float().to(self.counts_T.device)
        self.counts_T = self.counts_T + here_T

    @staticmethod
    def _accumulate(store: dict[int, Tensor], layer: int, value: Tensor) -> None:
        store[layer] = store[layer] + value if layer in store else value

    def statistics(self) -> RoutingStatistics:
        """Copy the sums to the host and normalise them."""
        layers = sorted(self._histogram)
        histogram = np.stack([self._histogram[n].cpu().numpy() for n in layers])
        tokens = int(histogram[0].sum())
        sums = np.stack([self._sums[n].cpu().numpy() for n in layers]) / max(1, tokens)
        means = {f"{name}_L": sums[:, place] for place, name in enumerate(self.SUMS)}
        unique = np.array([float(self._unique[n]) for n in layers]) / max(1, self.forwards)
        load = np.stack([self._load[n].cpu().numpy() for n in layers])
        return RoutingStatistics(
            tokens=tokens,
            forwards=self.forwards,
            count_histogram_LC=histogram,
            load_LE=load,
            unique_experts_L=unique,
            **means,
        )
