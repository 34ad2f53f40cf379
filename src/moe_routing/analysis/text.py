"""The evaluation text that the analyses look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.config import TASKS
from moe_routing.data.items import Item, read_items
from moe_routing.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moe_routing.config import StudyConfig


def text_dataset(datasets: Iterable[str]) -> str:
    """Return the name of the study's first perplexity set.

    Raises:
        InputError: it has none.
    """
    for name in datasets:
        if TASKS[name] == "perplexity":
            return name
    allowed = ", ".join(name for name, task in TASKS.items() if task == "perplexity")
    raise InputError(f"datasets has no running text, which the analyses need; add one of {allowed}")


def data_path(results: Path, name: str) -> Path:
    """Return the file of an evaluation set."""
    return results / "data" / f"{name}.parquet"


def read_text(config: StudyConfig, results: Path) -> list[Item]:
    """Return the passages of the study's perplexity set."""
    return read_items(data_path(results, text_dataset(config.datasets)))


def first_items(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> list[Item]:
    """Return the first passages that hold at least ``tokens`` tokens; all if they do not."""
    total = 0
    for place, item in enumerate(items):
        total += len(tokenizer(item.continuations[0])["input_ids"])
        if total >= tokens:
            return list(items[: place + 1])
    return list(items)
