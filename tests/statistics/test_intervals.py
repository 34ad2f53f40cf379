"""Intervals of a cell's metrics."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from lm_eval.api import metrics as harness
from planted_items import with_gold

from moe_routing.errors import InputError
from moe_routing.statistics.intervals import metric_intervals
from moe_routing.statistics.proportions import wilson_interval


def estimates(items, task, seed=0, confidence=0.95):
    rng = np.random.default_rng(seed)
    found = metric_intervals(items, task, confidence=confidence, resamples=500, rng=rng)
    return {estimate.metric: estimate for estimate in found}


@pytest.fixture
def items(rng):
    n = 80
    made = pd.DataFrame(
        {
            "id": [f"i{i}" for i in range(n)],
            "cluster": [f"c{i}" for i in range(n)],
            "log_likelihood": -rng.gamma(3.0, 40.0, n),
            "tokens": rng.integers(20, 90, n),
            "words": rng.integers(10, 60, n),
            "bytes": rng.integers(80, 400, n),
            "correct": rng.random(n) < 0.4,
            "correct_norm": rng.random(n) < 0.6,
        }
    )
    return with_gold(made)


def test_perplexities_equal_the_harness(items):
    found = estimates(items, "perplexity")
    for metric, unit in (("word_perplexity", "words"), ("byte_perplexity", "bytes")):
        pairs = list(zip(items["log_likelihood"], items[unit], strict=True))
        assert found[metric].value == pytest.approx(harness.weighted_perplexity(pairs))
    pairs = list(zip(items["log_likelihood"], items["bytes"], strict=True))
    assert found["bits_per_byte"].value == pytest.approx(harness.bits_per_byte(pairs))
    total = -items["log_likelihood"].sum()
    assert found["token_perplexity"].value == pytest.approx(math.exp(total / items["tokens"].sum()))


def test_last_word_perplexity_equals_the_harness(items):
    items["log_likelihood"] /= 30
    found = estimates(items, "last_word")
    expected = harness.perplexity(list(items["log_likelihood"]))
    assert found["last_word_perplexity"].value == pytest.approx(expected)
    assert found["accuracy"].value == items["correct"].mean()


def test_multiple_choice_has_both_accuracies_with_wilson_limits(items):
    found = estimates(items, "multiple_choice")
    assert set(found) == {"accuracy", "accuracy_norm", "gold_bits_per_byte", "gold_margin"}
    expected = wilson_interval(items["correct_norm"].sum(), 80, 0.95)
    assert (found["accuracy_norm"].low, found["accuracy_norm"].high) == pytest.approx(expected)
    assert found["accuracy_norm"].n == 80


def test_bits_per_byte_of_the_right_continuation_are_a_mean_over_items(items):
    """Not a ratio of sums: a long continuation counts as much as a short one."""
    items["gold_bytes"] = np.arange(80) % 7 + 3
    items["gold_bits_per_byte"] = -items["log_likelihood"] / math.log(2) / items["gold_bytes"]
    found = estimates(items, "multiple_choice")["gold_bits_per_byte"]
    ratio = -items["log_likelihood"].sum() / math.log(2) / items["gold_bytes"].sum()
    assert found.value == pytest.approx(items["gold_bits_per_byte"].mean())
    assert abs(found.value - ratio) > 0.1
    assert found.low < found.value < found.high


def test_clusters_widen_the_interval_of_accuracy(items):
    alone = estimates(items, "multiple_choice")["accuracy"]
    items["cluster"] = np.where(items["correct"], "a", "b") + pd.Series(np.arange(80) % 4).astype(
        str
    )
    together = estimates(items, "multiple_choice")["accuracy"]
    assert together.value == alone.value
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_all_right_and_all_wrong_have_intervals_inside_0_and_1(items):
    for value in (True, False):
        found = estimates(items.assign(correct=value, correct_norm=value), "multiple_choice")
        accuracy = found["accuracy"]
        assert 0 <= accuracy.low <= accuracy.value <= accuracy.high <= 1
        assert accuracy.high - accuracy.low > 0.03


def test_bits_and_byte_perplexity_say_the_same(items):
    found = estimates(items, "perplexity")
    bits, perplexity = found["bits_per_byte"], found["byte_perplexity"]
    for limit in ("low", "value", "high"):
        assert getattr(bits, limit) == pytest.approx(math.log2(getattr(perplexity, limit)))


def test_seed_and_confidence_matter(items):
    first = estimates(items, "perplexity")["token_perplexity"]
    assert first == estimates(items, "perplexity")["token_perplexity"]
    assert first.low != estimates(items, "perplexity", seed=1)["token_perplexity"].low
    narrow = estimates(items, "perplexity", confidence=0.5)["token_perplexity"]
    assert first.low < narrow.low < narrow.value < narrow.high < first.high


@pytest.mark.parametrize(
    ("change", "task", "message"),
    [
        (lambda d: d, "cloze", "unknown task 'cloze'; allowed: perplexity"),
        (lambda d: d.iloc[:0], "perplexity", "no items"),
        (lambda d: d.iloc[:1], "perplexity", "single cluster"),
        (lambda d: d.drop(columns="words"), "perplexity", "lacks the column 'words'"),
        (lambda d: d.assign(correct=None), "last_word", "column 'correct' of item 'i0' is nan"),
        (
            lambda d: d.assign(log_likelihood=-np.inf),
            "perplexity",
            "column 'log_likelihood' of item 'i0' is -inf; allowed: finite",
        ),
    ],
)
def test_bad_cells_end_in_one_clear_line(items, change, task, message):
    with pytest.raises(InputError, match=message) as error:
        estimates(change(items), task)
    assert "\n" not in str(error.value)
