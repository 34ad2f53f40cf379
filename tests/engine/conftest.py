"""Fixtures of the engine."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def threads(request):
    """Give torch the number of threads that the test's module states in ``THREADS``."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.module.THREADS)
    yield request.module.THREADS
    torch.set_num_threads(before)
