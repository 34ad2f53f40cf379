"""Co-activation, domain and vocabulary specialisation equal slow counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import permutations

import numpy as np
import pytest

from moe_routing.analysis.specialisation import (
    coactivation,
    domain_specialisation,
    largest_proportion,
    vocabulary_specialisation,
)


@pytest.fixture
def index(rng):
    return np.argsort(rng.random((2, 400, 6)), axis=-1)[..., :3]


def test_coactivation_counts_all_pairs_not_only_neighbours(index):
    table = coactivation(index, 6)
    assert len(table) == 2 * 6 * 5
    together, alone = Counter(), Counter()
    for layer, index_TK in enumerate(index.tolist()):
        for chosen in index_TK:
            alone.update((layer, expert) for expert in chosen)
            together.update((layer, a, b) for a, b in permutations(chosen, 2))
    for row in table.itertuples():
        pair = together[row.layer, row.expert_a, row.expert_b]
        assert row.tokens_a == alone[row.layer, row.expert_a]
        assert row.proportion == pytest.approx(pair / row.tokens_a)
        assert row.lift == pytest.approx(row.proportion / (alone[row.layer, row.expert_b] / 400))


def test_partners_of_an_expert_share_its_other_slots(index):
    table = coactivation(index, 6)
    assert np.allclose(table.groupby(["layer", "expert_a"])["proportion"].sum(), 2.0)


def test_experts_that_always_meet_have_share_one():
    index = np.array([[[0, 1], [1, 0], [2, 3]]])
    table = coactivation(index, 5).set_index(["expert_a", "expert_b"])
    assert table.loc[(0, 1), "proportion"] == 1.0
    assert table.loc[(0, 2), "proportion"] == 0.0
    assert np.isnan(table.loc[(4, 0), "proportion"])


def test_domain_specialisation_by_hand():
    loads = {"news": (np.array([[8, 2]]), 10), "code": (np.array([[5, 15]]), 20)}
    table = domain_specialisation(loads).set_index(["domain", "expert"])
    assert table.loc[("news", 0), "proportion"] == pytest.approx(0.8)
    assert table.loc[("code", 0), "overall"] == pytest.approx((0.8 + 0.25) / 2)
    assert table.loc[("code", 1), "lift"] == pytest.approx(0.75 / ((0.2 + 0.75) / 2))
    assert table.loc[("code", 1), "n_tokens"] == 20


def test_largest_share_equals_a_loop(rng):
    expert_T, id_T = rng.integers(0, 4, 300), rng.integers(0, 25, 300)
    groups = defaultdict(list)
    for expert, token in zip(expert_T.tolist(), id_T.tolist(), strict=True):
        groups[token].append(expert)
    proportion_X, count_X = largest_proportion(expert_T, id_T)
    for place, token in enumerate(sorted(groups)):
        most = Counter(groups[token]).most_common(1)[0][1]
        assert count_X[place] == len(groups[token])
        assert proportion_X[place] == pytest.approx(most / len(groups[token]))


def test_a_router_that_reads_the_token_id_is_found_out(rng):
    id_T = rng.integers(0, 12, 600)
    by_id, noise = id_T % 4, rng.integers(0, 4, 600)
    table = vocabulary_specialisation(np.stack([by_id, noise]), {"input": id_T}, rng)
    assert table["mean"][0] == 1.0
    assert table["mean_frequent"][0] == 1.0
    assert table["shuffled_frequent"][0] < 0.5
    assert abs(table["mean"][1] - table["shuffled"][1]) < 0.1


def test_ids_that_occur_once_say_nothing_and_the_table_shows_it(rng):
    once = np.arange(50)
    table = vocabulary_specialisation(rng.integers(0, 4, (1, 50)), {"input": once}, rng)
    assert table["mean"][0] == table["shuffled"][0] == 1.0
    assert np.isnan(table["mean_frequent"][0])
    assert table["n_frequent"][0] == 0
