"""Calls in threads: order, proportions of torch's threads, errors."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from moe_routing.engine.workers import MAX_WORKERS, divide_threads, map_in_order

THREADS = 4


@pytest.mark.parametrize("count", range(1, 65))
def test_workers_use_most_threads(count):
    workers = divide_threads(count)
    assert 1 <= workers <= MAX_WORKERS
    assert count - workers * (count // workers) <= count // (2 * MAX_WORKERS) + 1
    assert workers == count or count > MAX_WORKERS


def test_results_come_in_order_whoever_is_first(threads):
    last_is_done = threading.Event()

    def work(item):
        if item == 1:
            last_is_done.set()
        elif item == 0:
            assert last_is_done.wait(30)
        return item * item

    assert list(map_in_order(work, range(5), 2)) == [0, 1, 4, 9, 16]


def test_calls_are_at_once_and_share_the_threads(threads):
    together = threading.Barrier(2)

    def work(_):
        together.wait(30)
        return torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    assert list(map_in_order(work, range(4), 2)) == [(2, False)] * 4
    assert torch.get_num_threads() == threads
    new = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert new == [threads]


def test_one_worker_is_the_caller(threads):
    seen = list(map_in_order(lambda _: threading.current_thread(), range(2), 1))
    assert seen == [threading.main_thread()] * 2


def test_items_are_taken_as_needed(threads):
    taken = []

    def items():
        for item in range(100):
            taken.append(item)
            yield item

    results = map_in_order(lambda item: item, items(), 2)
    assert next(results) == 0
    assert len(taken) <= 4
    results.close()
    assert torch.get_num_threads() == threads


def test_an_error_ends_it(threads):
    begun = []

    def work(item):
        begun.append(item)
        if item == 1:
            raise ValueError("one")
        return item

    with pytest.raises(ValueError, match="one"):
        list(map_in_order(work, range(100), 2))
    assert len(begun) < 10
    assert torch.get_num_threads() == threads


def test_tests_have_the_threads_that_their_environment_names():
    """By default one. It is named before torch is imported; afterwards nobody would read it."""
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
