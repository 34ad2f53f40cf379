"""Memory of the dropless experts: proportional to the selected pairs, not to all slots.

Counts the bytes of all tensors alive at once while one layer's experts run on the CPU, and prints a
table by experts per token: the peak, the peak per selected pair, and the number of rows of hidden
size per token that are alive at the peak (its slope in the hidden size; index tables have none).

    python benchmarks/memory.py --tokens 2048 --slots 64 --json memory.json
"""

from __future__ import annotations

import argparse
import weakref
from pathlib import Path

import torch
from measure import machine, show
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moe_routing.engine.experts import EXPERTS_IMPLEMENTATION

EXPERTS = 64
MEANS = (1, 2, 4, 8, 16, 32, 64)


class PeakBytes(TorchDispatchMode):
    """Count the bytes of tensors made inside the context: alive now, and the most at once.

    Storages are counted when an operator returns them and until they are freed. Memory
    that an operator allocates and frees inside is not seen, nor is memory outside torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        inputs = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for leaf in _tensors(result):
            storage = leaf.untyped_storage()
            if storage._cdata not in inputs | self._known:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def make_experts(hidden: int, inner: int) -> nn.Module:
    """Return one layer's experts with small random weights."""
    config = OlmoeConfig(
        hidden_size=hidden, intermediate_size=inner, num_experts=EXPERTS, num_experts_per_tok=1
    )
    config._experts_implementation = EXPERTS_IMPLEMENTATION
    module = OlmoeExperts(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return module


def make_index(tokens: int, slots: int, mean: int) -> Tensor:
    """Return expert ids, (tokens, slots), padded ones last; the first token fills every slot."""
    generator = torch.Generator().manual_seed(0)
    index_TK = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :slots]
    count_T = torch.full((tokens,), mean)
    count_T[0] = slots
    return index_TK.masked_fill(torch.arange(slots) >= count_T[:, None], EXPERTS)


def peak_bytes(index_TK: Tensor, hidden: int, inner: int) -> int:
    """Return the most bytes that one layer's experts hold at once, inputs and weights left out."""
    module = make_experts(hidden, inner)
    hidden_TH = torch.ones(index_TK.shape[0], hidden)
    weight_TK = (index_TK < EXPERTS) / 8
    with torch.inference_mode(), PeakBytes() as memory:
        module(hidden_TH, index_TK, weight_TK)
    return memory.peak


def rows_alive(index_TK: Tensor, hidden: int, inner: int) -> float:
    """Return how many float32 rows of hidden size are alive at the peak."""
    more = peak_bytes(index_TK, 2 * hidden, inner) - peak_bytes(index_TK, hidden, inner)
    return more / (4 * hidden)


def main(argv: list[str] | None = None) -> None:
    """Parse arguments, count, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--slots", type=int, default=EXPERTS, help="max_k")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--inner", type=int, default=16, help="size of an expert")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args(argv)
    rows = []
    for mean in (mean for mean in MEANS if mean <= arguments.slots):
        index_TK = make_index(arguments.tokens, arguments.slots, mean)
        pairs = int((index_TK < EXPERTS).sum())
        peak = peak_bytes(index_TK, arguments.hidden, arguments.inner)
        rows.append(
            {
                "experts per token": mean,
                "pairs": pairs,
                "peak, MiB": peak / 2**20,
                "bytes per pair": peak / pairs,
                "rows of hidden size per token": rows_alive(
                    index_TK, arguments.hidden, arguments.inner
                )
                / arguments.tokens,
            }
        )
    show({"arguments": vars(arguments), "machine": machine(), "memory": rows}, arguments.json)


if __name__ == "__main__":
    main()
