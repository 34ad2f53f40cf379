"""Route a mixture-of-experts model by a rule other than its fixed top-k, and measure the effect.

from moe_routing import calibrate, routed

calibration = calibrate(model, tokenizer, texts, margin=0.01)
with routed(model, "certified_k8_m001", calibration=calibration):
    model.generate(**inputs)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_routing.engine.recorder import Recorder
    from moe_routing.engine.routed import routed
    from moe_routing.evaluation.calibrate import calibrate
    from moe_routing.routing.strategies import parse_strategy

__version__ = "0.1.0"
_HOMES = {
    "Recorder": "moe_routing.engine.recorder",
    "calibrate": "moe_routing.evaluation.calibrate",
    "parse_strategy": "moe_routing.routing.strategies",
    "routed": "moe_routing.engine.routed",
}
__all__ = ["Recorder", "calibrate", "parse_strategy", "routed"]


def __getattr__(name: str) -> object:
    """Import on first use: torch and transformers take seconds, and many jobs need neither."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_routing' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return [*__all__, "__version__"]
