"""Strategies that rank a token's experts and keep the first so many of them."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from moe_routing.routing.strategies.base import Strategy

if TYPE_CHECKING:
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.ranking import Ranker
    from moe_routing.routing.types import Selector


class Ranked(Strategy):
    """A strategy that keeps a prefix of a ranking, which the controls can take apart."""

    @abstractmethod
    def ranker(self, calibration: Calibration | None, num_experts: int) -> Ranker:
        """Return the function that ranks experts and says how many to keep."""

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return the function that chooses experts."""
        from moe_routing.routing.ranking import prefix_selector

        return prefix_selector(self.ranker(calibration, num_experts), num_experts)
