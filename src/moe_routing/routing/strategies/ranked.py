"""Strategies that rank a token's experts and keep the first ones."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from moe_routing.routing.strategies.base import Strategy

if TYPE_CHECKING:
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.ranking import Ranker
    from moe_routing.routing.types import Selector


class Ranked(Strategy):
    """A strategy that keeps a prefix of a ranking, so that it can be the base of a control."""

    @abstractmethod
    def ranker(self, calibration: Calibration | None, num_experts: int) -> Ranker:
        """Return the function that ranks the experts and decides how many to keep."""

    def selector(self, calibration: Calibration | None, num_experts: int) -> Selector:
        """Return the function that chooses experts."""
        from moe_routing.routing.ranking import prefix_selector

        return prefix_selector(self.ranker(calibration, num_experts), num_experts)
