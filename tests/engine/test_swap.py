"""Attributes are put back, or taken away again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from moe_routing.engine.patching import swapped


def test_a_value_is_put_back_even_after_an_error():
    owner = SimpleNamespace(x=1)

    def fail():
        with swapped(owner, "x", 2):
            assert owner.x == 2
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert owner.x == 1


def test_a_forward_shadows_that_of_its_class_and_goes_again():
    module = nn.Linear(2, 2)
    with swapped(module, "forward", lambda rows: rows):
        assert module(3) == 3
        with swapped(module, "forward", lambda rows: -rows):
            assert module(3) == -3
        assert module(3) == 3
    assert "forward" not in vars(module)
