"""Pretraining text as packed token windows, in an order that depends only on seed and step."""

from __future__ import annotations

import gzip
import json
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_pretraining.settings import HubTextSource, LocalTextSource, TextSource
from moe_routing.data.documents import text_blocks
from moe_routing.errors import InputError
from moe_routing.files import atomic_path, sha256_of
from moe_routing.hub import explained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SHORTEST_PERIOD = 8
"""Length in tokens of the shortest text that is repeated to fill a window."""

COMMON_TOKENS = 256
"""Number of most frequent tokens that count as common: punctuation, function words and so on."""

OPENERS = {".xz": lzma.open, ".gz": gzip.open}


def read_documents(source: TextSource) -> Iterator[str]:
    """Yield the documents of a source, in order.

    A text file (also .xz, .gz) has one paragraph per line and an empty line between documents; a
    Hub data set has one document per row.

    Raises:
        InputError: the file is missing or does not have the config's hash; there is no such column;
            or the Hub cannot be reached, or has no such data set, commit, subset or split.
    """
    documents = _read_file(source) if source.kind == "local" else _read_hub(source)
    return islice(documents, source.max_documents)


def leading_documents(source: TextSource, size: int) -> Iterator[str]:
    """Yield the first documents of a source until they have ``size`` UTF-8 bytes."""
    for document in read_documents(source):
        yield document
        size -= len(document.encode())
        if size <= 0:
            return


def _read_file(source: LocalTextSource) -> Iterator[str]:
    path = Path(source.path)
    check_file(path, source.sha256, f"pretraining source '{source.name}': path")
    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
        yield from text_blocks(line.rstrip("\n") for line in lines)


def check_file(path: Path, sha256: str | None, where: str) -> None:
    """Check that a file exists and, if the config gives a hash, that it has this hash.

    Raises:
        InputError: the file is missing or has another hash.
    """
    if not path.is_file():
        raise InputError(f"{where}: {path}: no such file")
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise InputError(f"{where}: {path}: sha256 is {found}; the config asks for {sha256}")


def _read_hub(source: HubTextSource) -> Iterator[str]:
    from datasets import load_dataset

    where = f"pretraining source '{source.name}'"
    with explained(f"{where}: {source.dataset}"):
        rows = load_dataset(
            source.dataset,
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        for row in rows:
            if source.column not in row:
                allowed = ", ".join(row)
                raise InputError(f"{where}: no column '{source.column}'; allowed: {allowed}")
            yield row[source.column]


def tokenize_source(
    source: TextSource,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    validation_share: float,
    seed: int,
) -> None:
    """Write a source's tokens as uint16 ``{name}.train.npy`` and ``{name}.validation.npy``.

    Documents are joined by the end-of-text token. Each goes to validation with probability
    ``validation_share``, drawn from ``seed``, so whole documents are held out.
    ``{name}.json`` has the numbers of bytes and tokens of the source.

    Raises:
        InputError: one of the splits has no documents; see also :func:`read_documents`.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    documents = read_documents(source)
    n_bytes = 0
    while batch := list(islice(documents, 64)):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        n_bytes += sum(len(document.encode()) for document in batch)
        for encoding, draw in zip(encodings, rng.random(len(batch)), strict=True):
            ids = np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16)
            parts["validation" if draw < validation_share else "train"].append(ids)
    for split, arrays in parts.items():
        if not arrays:
            raise InputError(
                f"pretraining source '{source.name}': no document for the {split} split; "
                "give more text or another validation_share"
            )
    for split, arrays in parts.items():
        path = folder / f"{source.name}.{split}.npy"
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, np.concatenate(arrays))
    tokens = sum(array.size for arrays in parts.values() for array in arrays)
    summary = {"bytes": n_bytes, "tokens": tokens, "bytes_per_token": n_bytes / tokens}
    with atomic_path(folder / f"{source.name}.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")


def uncommon_word_starts(
    token_files: Iterable[np.ndarray], tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """Return, for each id of the vocabulary, whether it begins an uncommon word; (vocabulary,).

    Args:
        token_files: arrays of token ids, the complete training text.
        tokenizer: a byte-level BPE, in which a token that begins a word begins with a space.
    """
    size = len(tokenizer)
    counts = sum(np.bincount(tokens, minlength=size) for tokens in token_files)
    common = np.argsort(-counts, kind="stable")[:COMMON_TOKENS]
    names = tokenizer.convert_ids_to_tokens(list(range(size)))
    starts = np.array([name.startswith("Ġ") and len(name) > 1 for name in names])
    starts[common] = False
    return starts


def recurring(ids_BL: np.ndarray, eligible_V: np.ndarray) -> np.ndarray:
    """Return which tokens are eligible and have occurred earlier in their sequence.

    Args:
        ids_BL: token ids, (sequences, tokens).
        eligible_V: which ids count, (vocabulary,).

    Returns:
        Booleans, (sequences, tokens); the first token of a sequence never recurs.
    """
    seen_BLL = ids_BL[:, :, None] == ids_BL[:, None, :]
    return np.tril(seen_BLL, -1).any(-1) & eligible_V[ids_BL]


def corpus_hashes(folder: Path, sources: list[TextSource]) -> dict[str, str]:
    """Return the sha256 of each training token file, by its name."""
    names = [f"{source.name}.train.npy" for source in sources]
    return {name: sha256_of(folder / name) for name in names}


@dataclass(frozen=True)
class PackedCorpus:
    """Windows of ``length`` + 1 tokens from several sources, mixed by weight.

    The window at position n of the schedule depends only on (seed, n), so that a run resumed at any
    step reads what an uninterrupted run would have read. Each epoch goes through a source in a new
    order, without replacement. In a proportion ``repeats`` of the windows, up to position
    ``repeats_end``, the first tokens are repeated to the end. This teaches attention to copy what
    followed the last time (induction heads, Olsson et al. 2022, 2209.11895), as needed for a name
    that recurs in a story; plain text has too little of that for a short run to learn it.
    """

    tokens: tuple[np.ndarray, ...]
    weights: tuple[float, ...]
    length: int
    seed: int
    repeats: float = 0.0
    repeats_end: float = math.inf

    @classmethod
    def open(
        cls, folder: Path, sources: list[TextSource], split: str, length: int, seed: int
    ) -> PackedCorpus:
        """Map the token files of ``sources`` into memory, without repeats within windows."""
        tokens = tuple(np.load(folder / f"{s.name}.{split}.npy", mmap_mode="r") for s in sources)
        for source, array in zip(sources, tokens, strict=True):
            if array.size <= length:
                raise InputError(
                    f"pretraining source '{source.name}': {array.size} {split} tokens; "
                    f"at least {length + 1} are needed"
                )
        return cls(tokens, tuple(s.weight for s in sources), length, seed)

    def batches(self, bounds: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield int64 arrays (sequences, length + 1), one for each pair of consecutive bounds.

        Args:
            bounds: increasing positions in the schedule: the start of each batch, and the end of
                the last.
        """
        proportion = np.array(self.weights) / sum(self.weights)
        draws = np.random.default_rng([self.seed, 0]).random(bounds[-1])
        source_of = np.searchsorted(np.cumsum(proportion)[:-1], draws, side="right")
        turn_of = np.zeros_like(source_of)
        for source in range(len(self.tokens)):
            mine = source_of == source
            turn_of[mine] = np.arange(mine.sum())
        orders: dict[tuple[int, int], np.ndarray] = {}
        for first, end in pairwise(bounds):
            yield np.stack(
                [
                    self._with_repeat(self._window(int(source_of[n]), int(turn_of[n]), orders), n)
                    for n in range(first, end)
                ]
            )

    def _with_repeat(self, window: np.ndarray, place: int) -> np.ndarray:
        """Fill the window at this position with its own beginning, or return it unchanged."""
        if self.repeats and place < self.repeats_end:
            # Each position has its own generator, so that a run can start at any step.
            rng = np.random.default_rng([self.seed, 0, place])
            if rng.random() < self.repeats:
                # The period is random: a fixed distance would make copying trivial.
                longest = window.size // 2
                period = rng.integers(min(SHORTEST_PERIOD, longest), longest, endpoint=True)
                return np.resize(window[:period], window.size)
        return window

    def _window(
        self, source: int, turn: int, orders: dict[tuple[int, int], np.ndarray]
    ) -> np.ndarray:
        """Return the window of a source's ``turn``-th use."""
        tokens = self.tokens[source]
        n_windows = (tokens.size - 1) // self.length
        epoch, place = divmod(turn, n_windows)
        if (source, epoch) not in orders:
            rng = np.random.default_rng([self.seed, 1 + source, epoch])
            orders[source, epoch] = rng.permutation(n_windows)
        start = int(orders[source, epoch][place]) * self.length
        return tokens[start : start + self.length + 1].astype(np.int64)
