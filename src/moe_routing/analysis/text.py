"""The evaluation text that the analyses look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.data.items import Item, read_items
from moe_routing.vocabulary import DATASETS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moe_routing.config.study import StudyConfig


def text_dataset(datasets: Iterable[str]) -> str:
    """Return the set whose text the analyses read.

    It is the study's first perplexity set; without one the first of passages that end in a word to
    predict, else the first of any kind.

    >>> text_dataset(["hellaswag", "lambada", "wikipedia"]), text_dataset(["hellaswag", "lambada"])
    ('wikipedia', 'lambada')
    """
    names = list(datasets)
    for task in ("perplexity", "last_word"):
        for name in names:
            if DATASETS[name].task == task:
                return name
    return names[0]


def data_path(results: Path, name: str) -> Path:
    """Return the file of an evaluation set."""
    return results / "data" / f"{name}.parquet"


def read_text(config: StudyConfig, results: Path) -> list[Item]:
    """Return the texts that the analyses read, each as a document without a context.

    Items of other tasks become their context and right continuation.
    """
    from moe_routing.analysis.capture import item_text

    return [
        replace(item, context="", continuations=(item_text(item),), label=None)
        for item in read_items(data_path(results, text_dataset(config.datasets)))
    ]


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
