"""Concurrent batches on the CPU, one per thread.

Two threads that share an operator wait for each other at its end, and one of them is idle between
operators. Two batches on a core each avoid both. Torch releases the GIL inside its operators.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

MAX_WORKERS = 4
"""Between operators a worker holds the GIL, for about a seventh of its time."""

In = TypeVar("In")
Out = TypeVar("Out")


def divide_threads(threads: int) -> int:
    """Return the number of workers that, with equally many threads each, use most threads."""
    return threads // -(-threads // MAX_WORKERS)


def map_in_order(function: Callable[[In], Out], items: Iterable[In], workers: int) -> Iterator[Out]:
    """Yield ``function(item)`` for each item in order, with ``workers`` concurrent calls.

    Torch's threads are divided among the workers. A single worker is the calling thread. Items are
    taken as they are needed; after an error no further call starts.

    Args:
        function: what to call.
        items: its arguments.
        workers: number of concurrent calls.
    """
    if workers == 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    running: deque[Future[Out]] = deque()
    try:
        with ThreadPoolExecutor(workers, "batch", torch.set_num_threads, (share,)) as pool:
            try:
                for item in items:
                    running.append(pool.submit(function, item))
                    if len(running) > workers:  # one is queued: no worker idles
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                for future in running:
                    future.cancel()
    finally:
        # torch.set_num_threads in a worker also applies to every thread started later.
        torch.set_num_threads(threads)
