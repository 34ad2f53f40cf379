from __future__ import annotations

import numpy as np
import pytest
from planted import write_planted


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory):
    """A results folder with a known loss of 3 pp, a known zero and a known gain."""
    return write_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """The same with few items, where speed counts and effects don't."""
    items = {"wikitext": 40, "hellaswag": 300, "lambada": 300}
    return write_planted(tmp_path_factory.mktemp("small"), items=items)
