"""Packs in work at once on the CPU, each in a thread of its own.

Two threads on one operator wait for each other at its end, and between operators one of them does
nothing; two packs, each on one core, do not. Torch lets go of Python's lock inside its operators.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

MAX_WORKERS = 4
"""Between operators a worker holds Python's lock, for about a seventh of its time."""

In = TypeVar("In")
Out = TypeVar("Out")


def divide_threads(threads: int) -> int:
    """Return how many workers, with equally many threads each, use most of the threads."""
    return threads // -(-threads // MAX_WORKERS)


def map_in_order(function: Callable[[In], Out], items: Iterable[In], workers: int) -> Iterator[Out]:
    """Yield ``function(item)`` of each item in order, with as many calls at once as workers.

    Torch's threads are divided among them. One worker is the calling thread. Items are taken as
    they are needed; after an error no further call begins.

    Args:
        function: what to call.
        items: its arguments.
        workers: calls at once.
    """
    if workers == 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    proportion = max(1, threads // workers)
    running: deque[Future[Out]] = deque()
    try:
        with ThreadPoolExecutor(workers, "pack", torch.set_num_threads, (proportion,)) as pool:
            try:
                for item in items:
                    running.append(pool.submit(function, item))
                    if len(running) > workers:  # one waits, so that no worker does
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                for future in running:
                    future.cancel()
    finally:
        # A worker's setting is also that of every thread that starts after it.
        torch.set_num_threads(threads)
