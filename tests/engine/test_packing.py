"""Packed batches hold every request exactly once, and map back to it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_routing.engine.packing import MIN_PREFIX, balance, build, fill, group_by_prefix
from moe_routing.engine.requests import TokenRequest

token_rows = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@st.composite
def candidates(draw):
    """Requests, and indices of those that share a prefix of any length; targets of any length."""
    requests, groups = [], []
    for _ in range(draw(st.integers(1, 5))):
        shared = draw(st.lists(st.integers(0, 2), max_size=30))
        group = []
        for _ in range(draw(st.integers(1, 4))):
            inputs = shared + draw(token_rows)
            targets = draw(st.integers(1, len(inputs)))
            group.append(len(requests))
            requests.append(TokenRequest(inputs, list(range(targets))))
        groups.append(group)
    return requests, groups


@settings(max_examples=100)
@given(candidates(), st.integers(1, 100))
def test_every_request_is_there_once_and_whole(case, budget):
    requests, groups = case
    seen = []
    for part in fill(group_by_prefix(requests, groups), budget):
        batch = build(requests, part)
        assert batch.ids_T.size == sum(group.size for group in part)
        assert len(part) == 1 or batch.ids_T.size <= budget
        ends = [*batch.first_target[1:], batch.target_N.size]
        for row, member in enumerate(batch.members):
            a, b, c, d = batch.paths[row]
            path = [*range(a, b), *range(c, d)]
            request = requests[member]
            assert batch.ids_T[path].tolist() == request.input_ids
            assert batch.position_T[path].tolist() == list(range(len(path)))
            targets = slice(batch.first_target[row], ends[row])
            assert batch.target_N[targets].tolist() == request.target_ids
            assert batch.scored_N[targets].tolist() == path[-len(request.target_ids) :]
            seen.append(member)
    assert sorted(seen) == list(range(len(requests)))


@settings(max_examples=100)
@given(candidates())
def test_shared_inputs_are_there_once(case):
    requests, groups = case
    for members in groups:
        rows = [requests[index].input_ids for index in members]
        shared = 0
        while all(len(row) > shared for row in rows) and len({row[shared] for row in rows}) == 1:
            shared += 1
        worth_it = len(members) > 1 and shared >= MIN_PREFIX
        saved = shared * (len(members) - 1) if worth_it else 0
        size = sum(group.size for group in group_by_prefix(requests, [members]))
        assert size == sum(map(len, rows)) - saved


def test_long_groupscome_first_and_order_does_not_matter():
    requests = [TokenRequest([7] * size, [1]) for size in (3, 9, 5, 9)]
    batches = fill(group_by_prefix(requests, [[0], [1], [2], [3]]), budget=10)
    assert [[group.members[0] for group in groups] for groups in batches] == [[1], [3], [2, 0]]
    assert batches == fill(group_by_prefix(requests, [[3], [2], [1], [0]]), budget=10)


@settings(max_examples=100)
@given(candidates(), st.integers(1, 100), st.integers(1, 4))
def test_balanced_batches_are_similar_and_as_many_as_the_workers_need(case, budget, workers):
    groups = group_by_prefix(*case)
    batches = balance(groups, budget, workers)
    order = sorted(groups, key=lambda group: (-group.size, group.members))
    assert [group for batch in batches for group in batch] == order
    sizes = [sum(group.size for group in batch) for batch in batches]
    assert all(
        size <= budget or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True)
    )
    allowed = -(-len(fill(groups, budget)) // workers) * workers
    assert len(batches) <= allowed
    # With smaller batches there would be more of them.
    if max(sizes) > order[0].size:
        assert len(fill(groups, max(sizes) - 1)) > allowed


def test_balance_of_nothing_and_of_equal_requests():
    assert balance([], 100, 2) == []
    groups = group_by_prefix([TokenRequest([1] * 10, [1])] * 12, [[index] for index in range(12)])
    assert [len(batch) for batch in balance(groups, 1000, 4)] == [3, 3, 3, 3]
    assert [len(batch) for batch in balance(groups, 50, 1)] == [4, 4, 4]
    assert [len(batch) for batch in balance(groups, 50, 2)] == [3, 3, 3, 3]
