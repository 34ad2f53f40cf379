"""How long scoring a study takes, from the size of its model and its sets, before anything runs.

A forward pass takes two floating-point operations per token and active parameter. What a machine
achieves of its peak varies: this gives the order of magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.config.cells import Cell, cells_of, strategy_of
from moe_routing.errors import InputError
from moe_routing.files import read_json
from moe_routing.hub import snapshot
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy

if TYPE_CHECKING:
    from moe_routing.config.study import ModelConfig, StudyConfig

SIZES: Mapping[str, tuple[int, float]] = {
    "wikitext": (62, 4600),
    "wikipedia": (3270, 140),
    "hellaswag": (10042, 201),
    "lambada": (5153, 90),
}
"""Items of each complete set, and tokens per item: shared contexts count once."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a mixture-of-experts transformer, as in its ``config.json``."""

    layers: int
    hidden: int
    expert: int
    experts: int
    top_k: int
    vocabulary: int
    heads: int
    key_value_heads: int

    @classmethod
    def of(cls, values: Mapping[str, int]) -> Architecture:
        """Read the sizes from a ``config.json``.

        Raises:
            InputError: a size is missing.
        """

        def size(*names: str) -> int:
            found = [values[name] for name in names if values.get(name)]
            if not found:
                raise InputError(f"config.json of the model: key '{names[0]}' is missing")
            return found[0]

        heads = size("num_attention_heads")
        return cls(
            layers=size("num_hidden_layers"),
            hidden=size("hidden_size"),
            expert=size("moe_intermediate_size", "intermediate_size"),
            experts=size("num_experts", "num_local_experts"),
            top_k=size("num_experts_per_tok"),
            vocabulary=size("vocab_size"),
            heads=heads,
            key_value_heads=values.get("num_key_value_heads") or heads,
        )

    def active_parameters(self, experts: float) -> float:
        """Return the parameters that a token passes with this many experts per layer."""
        shared = self.key_value_heads / self.heads
        attention = self.hidden**2 * (2 + 2 * shared)
        layer = attention + self.hidden * (3 * self.expert * experts + self.experts)
        return self.layers * layer + self.vocabulary * self.hidden


@dataclass(frozen=True)
class SetEstimate:
    """The cells of one evaluation set: how many, of how many tokens, and how long they take."""

    dataset: str
    cells: int
    tokens: float
    hours: float
    longest: float


def read_architecture(model: ModelConfig) -> Architecture:
    """Return the sizes of a model; of a hub id its ``config.json`` is downloaded, a few kilobytes.

    Raises:
        InputError: there is no such model, or the hub cannot be reached.
    """
    folder = Path(model.path)
    if model.revision is not None:
        where = f"model.path: {model.path}@{model.revision}"
        folder = snapshot(where, model.path, model.revision, ["config.json"], kind="model")
    return Architecture.of(read_json(folder / "config.json"))


def experts_of(study: StudyConfig, cell: Cell, top_k: int) -> float:
    """Return the experts per token of a cell; of adaptive rules at most the model's own number."""
    strategy = parse_strategy(strategy_of(study, cell)).resolved(ModelRule(top_k, "softmax"))
    nominal = getattr(strategy, "base", strategy).nominal_experts
    if nominal is not None:
        return nominal
    if strategy.min_experts == strategy.max_experts:
        return strategy.max_experts
    return min(strategy.max_experts, top_k)


def estimate(study: StudyConfig, model: Architecture, teraflops: float) -> list[SetEstimate]:
    """Return the time of scoring, by evaluation set.

    Args:
        study: the config.
        model: sizes of its model.
        teraflops: what one GPU achieves, 10^12 operations per second.
    """
    found = []
    for name, dataset in study.datasets.items():
        items, per_item = SIZES[name]
        tokens = min(items, dataset.items or items) * per_item
        hours = [
            2 * model.active_parameters(experts_of(study, cell, model.top_k)) * tokens
            / (teraflops * 1e12) / 3600
            for cell in cells_of(study)
            if cell.dataset == name
        ]  # fmt: skip
        found.append(SetEstimate(name, len(hours), tokens, sum(hours), max(hours)))
    return found
