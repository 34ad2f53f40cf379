"""Routing telemetry, summed on the model's device and copied to the host once.

Shape letters: L layers, T tokens, K slots, E experts.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_routing.engine.context import Sums, current_context
from moe_routing.errors import InputError
from moe_routing.routing.types import Routing
from moe_routing.routing.weighting import selected_probability


@dataclass(frozen=True)
class RoutingStatistics:
    """What a recorder saw, by layer. A decision is the routing of one token in one layer.

    Counts go up to the experts of the layer that has most.

    Attributes:
        tokens: number of tokens.
        forwards: number of forward passes.
        count_histogram_LC: decisions with C = 0 ... E experts, (layers, experts + 1).
        load_LE: decisions that selected each expert, (layers, experts).
        entropy_L: mean entropy of the router's softmax, nats.
        max_probability_L: mean largest softmax probability.
        selected_mass_L: mean softmax mass of the selected experts.
        floor_binds_L: proportion of decisions raised to the strategy's minimum.
        cap_binds_L: proportion of decisions cut at the strategy's maximum.
        empty_L: proportion of decisions for which the rule itself selected no expert.
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
        proportion_C = self.count_histogram_LC.sum(0) / max(1, self.count_histogram_LC.sum())
        counts_C = np.arange(proportion_C.size)
        mean = float(proportion_C @ counts_C)
        return float(np.sqrt(proportion_C @ (counts_C - mean) ** 2))

    def check_finite(self, label: str) -> None:
        """Check router logits, because accelerators do not stop at NaN.

        Raises:
            InputError: router logits are not finite; the message starts with the label.
        """
        layers = np.flatnonzero(~np.isfinite(self.entropy_L))
        if layers.size:
            raise InputError(f"{label}: router logits of layer {layers[0]} are not finite")

    def by_layer(self) -> dict[str, list]:
        """Return plain lists by layer, for JSON."""
        fields = (
            "count_histogram_LC", "load_LE", "entropy_L", "max_probability_L", "selected_mass_L",
            "floor_binds_L", "cap_binds_L", "empty_L", "unique_experts_L",
        )  # fmt: skip
        rows = {name.rsplit("_", 1)[0]: getattr(self, name).tolist() for name in fields}
        return {"mean_experts": self.mean_experts_L().tolist(), **rows}


def entropy(probability_TE: Tensor) -> Tensor:
    """Return each row's entropy in nats, (tokens,); four times faster than ``special.entr``.

    Args:
        probability_TE: float32, (tokens, experts).
    """
    # A probability of 0 contributes 0 times the logarithm of the smallest number: 0.
    tiny = torch.finfo(probability_TE.dtype).tiny
    return probability_TE.clamp_min(tiny).log_().mul_(probability_TE).sum(1).neg_()


class Recorder:
    """Sums routing statistics over forward passes, on the device of each layer.

    Several threads may run a recorded model. Forward passes whose
    :class:`~moe_routing.engine.context.ForwardContext` has ``sums`` add to these;
    :meth:`merge` adds them here, in a fixed order for results that are equal bit for bit.
    """

    ROWS = ("entropy", "max_probability", "selected_mass", "floor_binds", "cap_binds", "empty")

    def __init__(self) -> None:
        """Start empty."""
        self._sums: Sums = {}
        self._lock = threading.Lock()

    def merge(self, sums: Sums) -> None:
        """Add the sums of a forward context."""
        with self._lock:
            for key, value in sums.items():
                _add(self._sums, key, value)

    @torch.no_grad()  # sums must not keep the graphs of all passes alive
    def add(self, layer: int, routing: Routing, floor: int, cap: int) -> None:
        """Add the routing of one layer in one forward pass."""
        probability_TE, selection = routing.probability_TE, routing.selection
        experts = probability_TE.shape[1]
        count_T, rejected_T = selection.count_T, selection.rejected_T
        index_TK = selection.index_TK
        mask_T = current_context().mask_T
        rows = torch.stack([
            entropy(probability_TE),
            probability_TE.amax(1),
            selected_probability(probability_TE, index_TK).sum(1),
            (rejected_T < floor).float(),
            (rejected_T > cap).float(),
            (rejected_T == 0).float(),
        ])  # fmt: skip
        ids = index_TK.reshape(-1)
        if mask_T is None:
            keep_T = torch.ones_like(count_T, dtype=torch.bool)
        else:
            keep_T = mask_T.to(count_T.device)
            rows = rows.where(keep_T, 0.0)
            ids = index_TK.masked_fill(~keep_T[:, None], experts).reshape(-1)
            count_T = count_T.where(keep_T, experts + 1)
        self._accumulate("rows", layer, rows.double().sum(1))
        histogram = torch.bincount(count_T, minlength=experts + 2)[: experts + 1]
        self._accumulate("histogram", layer, histogram)
        load_E = torch.bincount(ids, minlength=experts + 1)[:experts]
        self._accumulate("load", layer, load_E)
        self._accumulate("unique", layer, (load_E > 0).sum())
        self._accumulate("forwards", layer, 1)
        self._count(layer, selection.count_T, keep_T)

    def _count(self, layer: int, count_T: Tensor, keep_T: Tensor) -> None:
        context, count_T = current_context(), (count_T * keep_T).float()
        if layer > 0 and context.counts_T is not None:
            count_T = context.counts_T + count_T.to(context.counts_T.device)
        context.counts_T = count_T

    def _accumulate(self, name: str, layer: int, value: Tensor | int) -> None:
        sums = current_context().sums
        with self._lock:
            _add(self._sums if sums is None else sums, (name, layer), value)

    def _by_layer(self, name: str) -> dict[int, Tensor | int]:
        """Return one sum of every layer, in layer order."""
        return {layer: self._sums[key, layer] for key, layer in sorted(self._sums) if key == name}

    def statistics(self) -> RoutingStatistics:
        """Copy the sums to the host and normalise them.

        Raises:
            InputError: nothing was recorded.
        """
        if not self._sums:
            raise InputError(
                "the recorder saw no forward pass; allowed: one or more inside the context of "
                "routed(model, strategy, recorder=recorder)"
            )
        names = ("rows", "histogram", "load", "unique", "forwards")
        rows, histogram, load, unique, forwards = (
            _stacked([np.asarray(torch.as_tensor(v).cpu()) for v in self._by_layer(name).values()])
            for name in names
        )
        tokens = int(histogram[0].sum())
        means = rows / max(1, tokens)
        return RoutingStatistics(
            tokens=tokens,
            forwards=int(forwards[0]),
            count_histogram_LC=histogram,
            load_LE=load,
            unique_experts_L=unique / np.maximum(1, forwards),
            **{f"{name}_L": means[:, index] for index, name in enumerate(self.ROWS)},
        )


def _stacked(values: list[np.ndarray]) -> np.ndarray:
    """Stack the values of layers; those of layers with fewer experts are filled up with 0."""
    most = max(value.shape[-1] if value.ndim else 0 for value in values)
    return np.stack([np.pad(v, (0, most - len(v))) if v.ndim else v for v in values])


def _add(sums: Sums, key: tuple[str, int], value: Tensor | int) -> None:
    sums[key] = sums[key] + value if key in sums else value
