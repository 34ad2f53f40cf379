"""A package of its own that offers a strategy as an entry point, written into a folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from moe_routing.config import study
from moe_routing.routing import strategies
from moe_routing.routing.strategies import discovery

EVERY_OTHER = '''
from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from moe_routing.routing.strategies import Strategy
from moe_routing.vocabulary import Family, Look, Weighting


class EveryOther(Strategy):
    """Every other one of the k largest logits, the largest among them."""

    family: ClassVar[Family] = Family(
        "everyother",
        label="Every other",
        look=Look("#7A5CFF", "$E$"),
        definition="every other of the top {k}, softmax weights",
        selection="every other one of the k largest logits",
        words="every other expert",
    )
    codes: ClassVar[dict[str, str]] = {"k": "k"}

    k: int = Field(ge=1, description="Experts to choose from.")

    @property
    def max_experts(self) -> int:
        return (self.k + 1) // 2

    @property
    def weighting_kind(self) -> Weighting:
        return "softmax"

    def selector(self, calibration, num_experts):
        from moe_routing.routing.ordering import order_experts
        from moe_routing.routing.types import Selection

        def select(inputs, probability_TE):
            _, order_TE = order_experts(probability_TE)
            return Selection.fixed(order_TE[:, : self.k : 2])

        return select
'''


def write_package(folder: Path, source: str, **points: str) -> Path:
    """Write the module ``toy_routing`` and what an installer notes of it; return the folder.

    Args:
        folder: where to; a folder for ``PYTHONPATH``.
        source: text of the module.
        points: name of each entry point, and the object that it names.
    """
    (folder / "toy_routing.py").write_text(source, encoding="utf-8")
    about = folder / "toy_routing-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-routing\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (about / "entry_points.txt").write_text("\n".join([f"[{discovery.GROUP}]", *lines]) + "\n")
    return folder


def forget() -> None:
    """Look for strategies anew: what is on the path has changed."""
    sys.modules.pop("toy_routing", None)
    importlib.invalidate_caches()
    discovery._found.cache_clear()
    strategies._parsed.cache_clear()
    study._parsed.cache_clear()
