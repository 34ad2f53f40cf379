"""Many requests in one forward pass, without padding: a flat row of tokens.

Requests with the same context become a tree: the tokens they share once (the trunk), then what
each has of its own (its branch). A request that shares nothing is a trunk without branches.

Shape letters: T tokens of the pack, N scored positions of the pack.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_routing.evaluation.requests import TokenRequest

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
    """Where a tree lies in the pack: trunk ``[start, fork)``, then branches to ``end``."""

    start: int
    fork: int
    end: int
    branches: tuple[int, ...]


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
    """Return one tree a group, or one a request where a group shares too little."""
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


def build(requests: Sequence[TokenRequest], trees: Sequence[Tree]) -> Pack:
    """Lay trees out in one flat row."""
    ids: list[int] = []
    positions, scored, spans, paths, members, targets = [], [], [], [], [], []
    for tree in trees:
        start = len(ids)
        fork = start + tree.trunk
        ids += requests[tree.members[0]].input_ids[: tree.trunk]
        positions.append(np.arange(tree.trunk))
        for member, length in zip(tree.members, tree.branches, strict=True):
            begin = len(ids)
            ids += requests[member].input_ids[tree.trunk :]
            positions.append(np.arange(tree.trunk, tree.trunk + length))
            path = np.r_[start:fork, begin : len(ids)]
            scored.append(path[-len(requests[member].target_ids) :])
            targets.append(requests[member].target_ids)
            paths.append((start, fork, begin, len(ids)))
            members.append(member)
        spans.append(Span(start, fork, len(ids), tree.branches))
    counts = [len(target) for target in targets]
    return Pack(
        ids_T=np.array(ids, dtype=np.int64),
        position_T=np.concatenate(positions),
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
