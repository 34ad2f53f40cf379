"""Step-up procedures on test statistics: the decisions on p-values, without the p-values.

Shape letters: L layers, T tokens, E experts, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moe_routing.routing.nulls.base import Null, OrderedExperts
from moe_routing.routing.procedures import num_rejected_at
from moe_routing.routing.types import RouterInputs


@dataclass(frozen=True)
class StepUpTest:
    """A step-up procedure under a layer-monotone null.

    It rejects as many experts as :func:`moe_routing.routing.procedures.step_up` does on
    :meth:`Null.sorted_p_values`: the largest i with p_(i) at most the i-th level is the largest i
    whose i-th statistic is at least the i-th critical value.

    Attributes:
        null: the null.
        critical_LN: critical values of the ranks that can be rejected, (layers, ranks).
    """

    null: Null
    critical_LN: Tensor

    @classmethod
    def build(cls, null: Null, level_E: Tensor, num_layers: int) -> Self:
        """Find the critical values of a procedure's levels, float64, (experts,)."""
        critical_LE = torch.stack(
            [null.critical_values(layer, level_E) for layer in range(num_layers)]
        )
        return cls(null, critical_LE[:, : null.max_rejections(critical_LE)])

    def to(self, device: torch.device | str) -> Self:
        """Return the test with its tables on a device."""
        return type(self)(self.null.to(device), self.critical_LN.to(device))

    def __call__(self, inputs: RouterInputs) -> tuple[OrderedExperts, Tensor]:
        """Return the ordered experts and the number of rejections, int64, (tokens,)."""
        critical_N = self.critical_LN[inputs.layer]
        ordered = self.null.order(inputs, critical_N.shape[0])
        return ordered, num_rejected_at(ordered.statistic_TN, critical_N)
