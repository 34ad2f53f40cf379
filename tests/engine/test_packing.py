"""Packs hold every request once, whole, and find their way back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_routing.engine.packing import MIN_TRUNK, build, fill, plant, spread
from moe_routing.engine.requests import TokenRequest

token_rows = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@st.composite
def groups_of_requests(draw):
    """Groups whose members share a prefix of any length; targets of any length."""
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


@settings(max_examples=100, deadline=None)
@given(groups_of_requests(), st.integers(1, 100))
def test_every_request_is_there_once_and_whole(case, budget):
    requests, groups = case
    trees = plant(requests, groups)
    packs = fill(trees, budget)
    seen = []
    for group in packs:
        pack = build(requests, group)
        assert pack.ids_T.size == sum(tree.size for tree in group)
        assert len(group) == 1 or pack.ids_T.size <= budget
        ends = [*pack.first_target[1:], pack.target_N.size]
        for row, member in enumerate(pack.members):
            a, b, c, d = pack.paths[row]
            path = [*range(a, b), *range(c, d)]
            request = requests[member]
            assert pack.ids_T[path].tolist() == request.input_ids
            assert pack.position_T[path].tolist() == list(range(len(path)))
            targets = slice(pack.first_target[row], ends[row])
            assert pack.target_N[targets].tolist() == request.target_ids
            assert pack.scored_N[targets].tolist() == path[-len(request.target_ids) :]
            seen.append(member)
    assert sorted(seen) == list(range(len(requests)))


@settings(max_examples=100, deadline=None)
@given(groups_of_requests())
def test_shared_inputs_are_there_once(case):
    requests, groups = case
    for group in groups:
        rows = [requests[place].input_ids for place in group]
        shared = 0
        while all(len(row) > shared for row in rows) and len({row[shared] for row in rows}) == 1:
            shared += 1
        worth_it = len(group) > 1 and shared >= MIN_TRUNK
        spared = shared * (len(group) - 1) if worth_it else 0
        size = sum(tree.size for tree in plant(requests, [group]))
        assert size == sum(map(len, rows)) - spared


def test_long_trees_come_first_and_order_does_not_matter():
    requests = [TokenRequest([7] * size, [1]) for size in (3, 9, 5, 9)]
    packs = fill(plant(requests, [[0], [1], [2], [3]]), budget=10)
    assert [[tree.members[0] for tree in trees] for trees in packs] == [[1], [3], [2, 0]]
    assert packs == fill(plant(requests, [[3], [2], [1], [0]]), budget=10)


@settings(max_examples=100, deadline=None)
@given(groups_of_requests(), st.integers(1, 100), st.integers(1, 4))
def test_spread_packs_are_alike_and_as_many_as_the_workers_need(case, budget, workers):
    trees = plant(*case)
    packs = spread(trees, budget, workers)
    order = sorted(trees, key=lambda tree: (-tree.size, tree.members))
    assert [tree for pack in packs for tree in pack] == order
    sizes = [sum(tree.size for tree in pack) for pack in packs]
    assert all(size <= budget or len(pack) == 1 for size, pack in zip(sizes, packs, strict=True))
    allowed = -(-len(fill(trees, budget)) // workers) * workers
    assert len(packs) <= allowed
    # With smaller packs there would be more of them.
    if max(sizes) > order[0].size:
        assert len(fill(trees, max(sizes) - 1)) > allowed


def test_spread_of_nothing_and_of_equal_requests():
    assert spread([], 100, 2) == []
    trees = plant([TokenRequest([1] * 10, [1])] * 12, [[place] for place in range(12)])
    assert [len(pack) for pack in spread(trees, 1000, 4)] == [3, 3, 3, 3]
    assert [len(pack) for pack in spread(trees, 50, 1)] == [4, 4, 4]
    assert [len(pack) for pack in spread(trees, 50, 2)] == [3, 3, 3, 3]
