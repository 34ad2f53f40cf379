"""The evaluation text that the analyses read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.config.cells import data_file
from moe_routing.config.study import StudyConfig
from moe_routing.data.items import Item, read_items
from moe_routing.vocabulary import text_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def data_path(results: Path, name: str) -> Path:
    """Return the file of an evaluation set."""
    return results / data_file(name)


def read_text(config: StudyConfig, results: Path) -> list[Item]:
    """Return the texts that the analyses read, as documents without a context.

    Items of other tasks become their context and right continuation.
    """
    return [
        replace(item, context="", continuations=(item.text,), label=None)
        for item in read_items(data_path(results, text_dataset(config.datasets)))
    ]


def first_items(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> list[Item]:
    """Return the first passages that hold at least ``tokens`` tokens, or all of them."""
    total = 0
    for index, item in enumerate(items):
        total += len(tokenizer(item.continuations[0])["input_ids"])
        if total >= tokens:
            return list(items[: index + 1])
    return list(items)
