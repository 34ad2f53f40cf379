"""Forwards are put back whoever leaves first, and copies are models of their own."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import ExitStack, contextmanager
from itertools import permutations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from moe_routing.engine.patching import patched_forward, replacements
from moe_routing.errors import InputError

ROW = torch.tensor([1.0, 2.0])


class Double(nn.Module):
    """Multiplies by a weight of 2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, rows):
        """Return twice the rows."""
        return self.weight * rows


def adding(number):
    return lambda below: lambda rows: below(rows) + number


def test_it_is_put_back_even_after_an_error():
    module = Double()

    def fail():
        with patched_forward(module, adding(10)):
            assert module(1) == 12
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert module(1) == 2
    assert "forward" not in vars(module)


def test_replacements_lie_on_each_other():
    module = Double()
    with patched_forward(module, adding(10)):
        with patched_forward(module, adding(100)):
            assert module(1) == 112
        assert module(1) == 12
    assert "forward" not in vars(module)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("own", [False, True])
def test_contexts_are_left_in_any_order(order, own):
    module = Double()
    if own:
        module.forward = lambda rows: 3 * rows
    before = dict(vars(module))
    numbers = [10, 100, 1000]
    contexts = [patched_forward(module, adding(number)) for number in numbers]
    for context in contexts:
        context.__enter__()
    left = sum(numbers)
    for index in order:
        contexts[index].__exit__(None, None, None)
        left -= numbers[index]
        assert module(1) == left + (3 if own else 2)
    assert vars(module) == before


def test_what_others_put_on_top_stays():
    module = Double()
    context = patched_forward(module, adding(10))
    context.__enter__()
    below = module.forward
    module.forward = lambda rows: -below(rows)
    context.__exit__(None, None, None)
    assert module(1) == -2


def test_a_sole_replacement_is_the_only_one():
    module = Double()
    with patched_forward(module, adding(10), "doubled by 'a'"):
        with pytest.raises(InputError, match="the model is doubled by 'a' already; leave"):
            patched_forward(module, adding(100), "doubled by 'b'").__enter__()
        with patched_forward(module, adding(1)):  # another kind, on top
            assert module(1) == 13
            with pytest.raises(InputError, match="doubled by 'a'"):
                patched_forward(module, adding(100), "doubled by 'b'").__enter__()
    with patched_forward(module, adding(100), "doubled by 'b'"):
        assert module(1) == 102
    assert "forward" not in vars(module)


def test_of_many_threads_one_gets_in():
    module = Double()
    start, inside, refused = threading.Barrier(8), [], []

    def ask(number):
        start.wait(30)
        try:
            context = patched_forward(module, adding(number), f"taken by {number}")
            context.__enter__()
            inside.append((number, context))
        except InputError:
            refused.append(number)

    threads = [threading.Thread(target=ask, args=(10 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((number, context),) = inside
    assert len(refused) == 7
    assert module(1) == 2 + number
    context.__exit__(None, None, None)
    assert "forward" not in vars(module)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),  # noqa: S301
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_is_of_its_own(duplicate):
    outer = nn.Sequential(Double(), Double())
    with ExitStack() as stack:
        for number in (10, 100):
            stack.enter_context(patched_forward(outer[1], adding(number), None))
        twin = duplicate(outer)
        assert outer(ROW).tolist() == [114.0, 118.0]
        outer[1].weight.fill_(5)
        assert twin(ROW).tolist() == [4.0, 8.0]
        twin[1].weight.fill_(7)
        assert twin(ROW).tolist() == [14.0, 28.0]
    assert twin(ROW).tolist() == [14.0, 28.0]
    assert outer(ROW).tolist() == [10.0, 20.0]
    assert not list(replacements(twin[1]))
    with patched_forward(twin[1], adding(1)):
        assert twin(ROW).tolist() == [15.0, 29.0]
    assert twin(ROW).tolist() == [14.0, 28.0]


class Brings(ModelHook):
    """Has a weight of 2 only while the module computes, as accelerate does when it offloads."""

    def init_hook(self, module):
        """Take the weight away."""
        module.weight.fill_(torch.nan)
        return module

    def pre_forward(self, module, *args, **kwargs):
        """Bring the weight."""
        module.weight.fill_(2)
        return args, kwargs

    def post_forward(self, module, output):
        """Take the weight away."""
        module.weight.fill_(torch.nan)
        return output


@contextmanager
def hooked(module):
    add_hook_to_module(module, Brings())
    yield
    remove_hook_from_module(module)
    module.weight.fill_(2)


def plus_weight(module):
    return lambda below: lambda rows: below(rows) + 10 * module.weight


def test_a_replacement_lies_below_the_hooks_of_accelerate():
    module = Double()
    with hooked(module):
        stock = dict(vars(module))
        assert module(1) == 2
        with patched_forward(module, plus_weight(module)):
            assert module(1) == 22
            twin = copy.deepcopy(module)
        assert twin(1) == 2
        assert vars(module) == stock
        assert module(1) == 2


def test_hooks_may_come_and_go_inside():
    module = Double()
    with patched_forward(module, plus_weight(module)):
        add_hook_to_module(module, Brings())
        assert module(1) == 22
    assert module(1) == 2
    with patched_forward(module, plus_weight(module)):
        assert module(1) == 22
        remove_hook_from_module(module)
        module.weight.fill_(2)
        assert module(1) == 22
    assert module(1) == 2
    assert not list(replacements(module))
