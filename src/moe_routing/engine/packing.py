"""Packed batches: many requests in one forward pass, as a flat row of tokens without padding.

Requests with the same context form a prefix group: the row holds the tokens they share (the
prefix) once, and the remaining tokens of each request (its continuation). Half of the
continuations lie before the prefix and half after it, so that either half and the prefix are one
contiguous slice, which attention reads without a copy. A request that shares nothing is a prefix
without continuations.

Shape letters: T tokens of the packed batch, N scored positions of the packed batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np

from moe_routing.engine.requests import TokenRequest
from moe_routing.routing.draws import prefix_keys

MIN_PREFIX = 8
"""A shorter prefix is not worth sharing: continuations need an attention mask."""


@dataclass(frozen=True)
class PrefixGroup:
    """Requests that share their first ``prefix`` inputs.

    Attributes:
        members: indices of the requests in the list they came from.
        prefix: number of shared inputs; all inputs if there is one member.
        continuations: number of further inputs of each member.
    """

    members: tuple[int, ...]
    prefix: int
    continuations: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of tokens of the group."""
        return self.prefix + sum(self.continuations)


@dataclass(frozen=True)
class Span:
    """Where a prefix group lies in the packed batch: continuations, the prefix, continuations.

    Attributes:
        start: flat index of its first token.
        left: number of tokens of each continuation before the prefix.
        prefix: number of tokens of the prefix.
        right: number of tokens of each continuation after the prefix.
    """

    start: int
    left: tuple[int, ...]
    prefix: int
    right: tuple[int, ...]

    @property
    def parts(self) -> tuple[int, ...]:
        """Number of tokens of each part, in order."""
        return (*self.left, self.prefix, *self.right)

    @property
    def size(self) -> int:
        """Number of tokens of the group."""
        return sum(self.parts)


@dataclass(frozen=True)
class PackedBatch:
    """The tokens of one forward pass.

    Attributes:
        ids_T: token ids, int64.
        position_T: position of each token in its request, int64.
        key_T: a hash of each token's request up to it, int64; see
            :func:`moe_routing.routing.draws.prefix_keys`.
        spans: where the prefix groups lie, in order.
        members: indices of the requests; the arrays below follow this order.
        scored_N: flat index of each input that predicts a target.
        target_N: the targets.
        first_target: index in ``target_N`` of each request's first target.
        paths: prefix and continuation of each request, as flat (start, end, start, end).
    """

    ids_T: np.ndarray
    position_T: np.ndarray
    key_T: np.ndarray
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


def group_by_prefix(
    requests: Sequence[TokenRequest], candidates: Sequence[Sequence[int]]
) -> list[PrefixGroup]:
    """Return the prefix groups of requests.

    Args:
        requests: the requests.
        candidates: indices of requests that may share their first tokens. They become one group,
            or one group per request if the prefix they share is shorter than ``MIN_PREFIX``.
    """
    groups: list[PrefixGroup] = []
    for members in candidates:
        inputs = [requests[index].input_ids for index in members]
        shared = _common_prefix(inputs) if len(members) > 1 else 0
        if shared >= MIN_PREFIX:
            rest = tuple(len(ids) - shared for ids in inputs)
            groups.append(PrefixGroup(tuple(members), shared, rest))
        else:
            groups += [
                PrefixGroup((index,), len(ids), (0,))
                for index, ids in zip(members, inputs, strict=True)
            ]
    return groups


def fill(groups: Sequence[PrefixGroup], budget: int) -> list[list[PrefixGroup]]:
    """Divide prefix groups into batches of at most ``budget`` tokens, the longest groups first.

    A group larger than the budget gets a batch of its own.
    """
    batches: list[list[PrefixGroup]] = []
    room = 0
    for group in sorted(groups, key=lambda group: (-group.size, group.members)):
        if group.size > room:
            batches.append([])
            room = budget
        batches[-1].append(group)
        room -= group.size
    return batches


def balance(groups: Sequence[PrefixGroup], budget: int, workers: int) -> list[list[PrefixGroup]]:
    """Divide prefix groups into batches of similar size.

    The number of batches is a multiple of ``workers`` if there are enough groups. No batch exceeds
    ``budget``, except one that holds a single group.
    """
    if not groups:
        return []
    count = -(-len(fill(groups, budget)) // workers) * workers
    mean = -(-sum(group.size for group in groups) // count)
    # The smallest limit that needs no more batches gives the most equal sizes.
    limits = range(mean, budget)
    above = bisect_left(limits, True, key=lambda limit: len(fill(groups, limit)) <= count)
    return fill(groups, min(mean + above, budget))


def fill_equal(
    groups: Sequence[PrefixGroup], targets: Sequence[int], budget: int, scored: int
) -> list[list[PrefixGroup]]:
    """Divide groups of one request each into batches of requests of equal length.

    Args:
        groups: the prefix groups.
        targets: number of targets of each request, by its index.
        budget: most tokens of a batch.
        scored: most rows of logits of a batch, in which every request has as many rows as the one
            with the most targets. A request above either limit gets a batch of its own.
    """

    def order(group: PrefixGroup) -> tuple[int, int]:
        return (-group.size, -targets[group.members[0]])

    batches = []
    for size, same in groupby(sorted(groups, key=order), key=lambda group: group.size):
        equal = list(same)
        while equal:
            most = targets[equal[0].members[0]]
            rows = max(1, min(budget // size, scored // most))
            batches.append(equal[:rows])
            equal = equal[rows:]
    return batches


def build(requests: Sequence[TokenRequest], groups: Sequence[PrefixGroup]) -> PackedBatch:
    """Lay prefix groups out in one flat row."""
    size = sum(group.size for group in groups)
    ids_T, position_T, key_T = (np.empty(size, dtype=np.int64) for _ in range(3))
    scored, spans, paths, members, targets = [], [], [], [], []
    start = 0
    for group in groups:
        half = len(group.members) // 2
        span = Span(start, group.continuations[:half], group.prefix, group.continuations[half:])
        begins = list(accumulate(span.parts, initial=start))
        prefix_start, prefix_end = begins[half : half + 2]
        starts = begins[:half] + begins[half + 1 : -1]
        for member, begin, length in zip(group.members, starts, group.continuations, strict=True):
            path = np.r_[prefix_start:prefix_end, begin : begin + length]
            ids_T[path] = requests[member].input_ids
            position_T[path] = np.arange(path.size)
            key_T[path] = prefix_keys(ids_T[path])
            scored.append(path[-len(requests[member].target_ids) :])
            targets.append(requests[member].target_ids)
            paths.append((prefix_start, prefix_end, begin, begin + length))
            members.append(member)
        spans.append(span)
        start += group.size
    counts = [len(target) for target in targets]
    return PackedBatch(
        ids_T=ids_T,
        position_T=position_T,
        key_T=key_T,
        spans=tuple(spans),
        members=tuple(members),
        scored_N=np.concatenate(scored),
        target_N=np.concatenate(targets),
        first_target=np.cumsum([0, *counts[:-1]]),
        paths=np.array(paths),
    )


def _common_prefix(rows: Sequence[list[int]]) -> int:
    """Return how many first elements are equal in all rows."""
    # All rows share at least what the lexically first and last ones share.
    first, last = min(rows), max(rows)
    shortest = min(len(first), len(last))
    different = (index for index in range(shortest) if first[index] != last[index])
    return next(different, shortest)
