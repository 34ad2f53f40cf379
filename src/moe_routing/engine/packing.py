"""Many requests in one forward pass, without padding: a flat row of tokens.

Requests with the same context become a tree: the tokens they share once (the trunk), and what
each has of its own (its branch). Half of the branches lie before the trunk and half behind it, so
that either half and the trunk are one slice of the row, which attention needs no copy of. A request
that shares nothing is a trunk without branches.

Shape letters: T tokens of the pack, N scored positions of the pack.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np

from moe_routing.engine.requests import TokenRequest

MIN_TRUNK = 8
"""Fewer shared tokens are not worth a tree: its branches attend through a mask."""


@dataclass(frozen=True)
class Tree:
    """Requests that share their first ``trunk`` inputs.

    Attributes:
        members: places of the requests in the list they came from.
        trunk: number of shared inputs; all inputs if there is one member.
        branches: number of further inputs of each member.
    """

    members: tuple[int, ...]
    trunk: int
    branches: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens of the tree."""
        return self.trunk + sum(self.branches)


@dataclass(frozen=True)
class Span:
    """Where a tree lies in the pack, from ``start`` on: branches, the trunk, branches.

    Attributes:
        start: flat index of its first token.
        left: number of tokens of each branch before the trunk.
        trunk: number of tokens of the trunk.
        right: number of tokens of each branch behind the trunk.
    """

    start: int
    left: tuple[int, ...]
    trunk: int
    right: tuple[int, ...]

    @property
    def parts(self) -> tuple[int, ...]:
        """Tokens of each part, in order."""
        return (*self.left, self.trunk, *self.right)

    @property
    def size(self) -> int:
        """Tokens of the tree."""
        return sum(self.parts)


@dataclass(frozen=True)
class Pack:
    """The tokens of one forward pass.

    Attributes:
        ids_T: token ids, int64.
        position_T: position of each token in its request, int64.
        spans: the trees, in order.
        members: places of the requests, in the order of what follows.
        scored_N: flat index of each input that predicts a target.
        target_N: the targets.
        first_target: for each request, where its targets begin in ``target_N``.
        paths: for each request, its trunk and branch as flat (start, end, start, end).
    """

    ids_T: np.ndarray
    position_T: np.ndarray
    spans: tuple[Span, ...]
    members: tuple[int, ...]
    scored_N: np.ndarray
    target_N: np.ndarray
    first_target: np.ndarray
    paths: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """Number of targets of each request."""
        return np.diff(self.first_target, append=self.target_N.size)


def plant(requests: Sequence[TokenRequest], groups: Sequence[Sequence[int]]) -> list[Tree]:
    """Return one tree per group, or one a request where a group shares too little."""
    trees: list[Tree] = []
    for group in groups:
        inputs = [requests[place].input_ids for place in group]
        shared = _common_prefix(inputs) if len(group) > 1 else 0
        if shared >= MIN_TRUNK:
            trees.append(Tree(tuple(group), shared, tuple(len(ids) - shared for ids in inputs)))
        else:
            trees += [
                Tree((place,), len(ids), (0,)) for place, ids in zip(group, inputs, strict=True)
            ]
    return trees


def fill(trees: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """Divide trees into packs of at most ``budget`` tokens, the longest trees first.

    A tree above the budget gets a pack of its own.
    """
    packs: list[list[Tree]] = []
    room = 0
    for tree in sorted(trees, key=lambda tree: (-tree.size, tree.members)):
        if tree.size > room:
            packs.append([])
            room = budget
        packs[-1].append(tree)
        room -= tree.size
    return packs


def spread(trees: Sequence[Tree], budget: int, workers: int) -> list[list[Tree]]:
    """Divide trees into packs of much the same size, a multiple of ``workers`` if there are enough.

    No pack is above ``budget``, apart from that of a single tree.
    """
    if not trees:
        return []
    count = -(-len(fill(trees, budget)) // workers) * workers
    mean = -(-sum(tree.size for tree in trees) // count)
    # The smallest limit that needs no more packs makes them most alike.
    limits = range(mean, budget)
    above = bisect_left(limits, True, key=lambda limit: len(fill(trees, limit)) <= count)
    return fill(trees, min(mean + above, budget))


def fill_equal(
    trees: Sequence[Tree], targets: Sequence[int], budget: int, scored: int
) -> list[list[Tree]]:
    """Divide trees of one request each into packs of requests of one length.

    Args:
        trees: the trees.
        targets: number of targets of each request, by its place.
        budget: most tokens of a pack.
        scored: most rows of logits of a pack, where each request has as many as the one with the
            most targets. A request above either gets a pack of its own.
    """

    def order(tree: Tree) -> tuple[int, int]:
        return (-tree.size, -targets[tree.members[0]])

    packs = []
    for size, group in groupby(sorted(trees, key=order), key=lambda tree: tree.size):
        equal = list(group)
        while equal:
            most = targets[equal[0].members[0]]
            rows = max(1, min(budget // size, scored // most))
            packs.append(equal[:rows])
            equal = equal[rows:]
    return packs


def build(requests: Sequence[TokenRequest], trees: Sequence[Tree]) -> Pack:
    """Lay trees out in one flat row."""
    size = sum(tree.size for tree in trees)
    ids_T, position_T = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    scored, spans, paths, members, targets = [], [], [], [], []
    start = 0
    for tree in trees:
        half = len(tree.members) // 2
        span = Span(start, tree.branches[:half], tree.trunk, tree.branches[half:])
        begins = list(accumulate(span.parts, initial=start))
        root, fork = begins[half : half + 2]
        starts = begins[:half] + begins[half + 1 : -1]
        for member, begin, length in zip(tree.members, starts, tree.branches, strict=True):
            path = np.r_[root:fork, begin : begin + length]
            ids_T[path] = requests[member].input_ids
            position_T[path] = np.arange(path.size)
            scored.append(path[-len(requests[member].target_ids) :])
            targets.append(requests[member].target_ids)
            paths.append((root, fork, begin, begin + length))
            members.append(member)
        spans.append(span)
        start += tree.size
    counts = [len(target) for target in targets]
    return Pack(
        ids_T=ids_T,
        position_T=position_T,
        spans=tuple(spans),
        members=tuple(members),
        scored_N=np.concatenate(scored),
        target_N=np.concatenate(targets),
        first_target=np.cumsum([0, *counts[:-1]]),
        paths=np.array(paths),
    )


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many first elements are the same in all rows."""
    # The rows between the lexically first and last share at least what these two do.
    first, last = min(rows), max(rows)
    shortest = min(len(first), len(last))
    different = (place for place in range(shortest) if first[place] != last[place])
    return next(different, shortest)
