"""Forwards replaced for a while.

A replacement lies on top of what it found. Contexts may be left in any order and in any thread:
the module computes what it did before, and what others have put on top meanwhile stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from moe_routing.errors import InputError

Forward = Callable[..., object]
T = TypeVar("T")

PLACES = ("_old_forward", "forward")
"""Where a module's own forward is looked up. Accelerate keeps it in the first, and in the second
its hooks, which bring weights and inputs to a device: a replacement lies below them."""

_LOCK = threading.Lock()


class Replacement:
    """A forward in place of another one, which lies below it.

    A copy of the module, made by ``copy`` or ``pickle``, gets what lies below: the copy is a model
    of its own, and not replaced.
    """

    def __init__(
        self, below: Forward, from_class: bool, make: Callable[[Forward], Forward], sole: str | None
    ) -> None:
        """Make the new forward; see :func:`swapped`.

        Args:
            below: the forward in place.
            from_class: whether that is the class's; the module itself holds nothing.
            make: from the forward in place to the new one.
            sole: what the new one does, where there is to be only one such.
        """
        self.below, self.from_class, self.sole = below, from_class, sole
        self.compute = make(below)
        self.live = True

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Compute the new forward."""
        return self.compute(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[Forward], Forward], tuple[Forward]]:
        return itself, (self.below,)


@contextmanager
def swapped(
    module: nn.Module, make: Callable[[Forward], Forward], sole: str | None = None
) -> Iterator[None]:
    """Replace a module's forward inside the context.

    Args:
        module: the module.
        make: from the forward in place to the new one.
        sole: what the new one does, where a module takes only one such at a time.

    Raises:
        InputError: ``sole``, and another such replacement is in place.
    """
    with _LOCK:
        replacement = _put(module, make, sole)
    try:
        yield
    finally:
        with _LOCK:
            _take(module, replacement)


def replacements(module: nn.Module) -> Iterator[Replacement]:
    """Return what replaces a module's forward, the last put in place first."""
    for place in PLACES:
        found = vars(module).get(place)
        while isinstance(found, Replacement):
            if found.live:
                yield found
            found = found.below


def sole_replacement(model: nn.Module) -> str | None:
    """Return the sole replacement in place somewhere in a model, such as "routed by 'x'"."""
    found = (new.sole for module in model.modules() for new in replacements(module))
    return next((sole for sole in found if sole), None)


def _put(module: nn.Module, make: Callable[[Forward], Forward], sole: str | None) -> Replacement:
    taken = next((found.sole for found in replacements(module) if found.sole), None)
    if sole and taken:
        raise InputError(
            f"the model is {taken} already; leave that context first: a model takes one at a time, "
            "whichever thread or wrapper asks"
        )
    place = next((place for place in PLACES if place in vars(module)), PLACES[-1])
    below, from_class = getattr(module, place), place not in vars(module)
    replacement = Replacement(below, from_class, make, sole)
    setattr(module, place, replacement)
    return replacement


def _take(module: nn.Module, replacement: Replacement) -> None:
    """Take a replacement away; one that something else lies on passes calls on from now on."""
    replacement.live, replacement.compute = False, replacement.below
    for place in PLACES:
        if vars(module).get(place) is replacement:
            _restore(module, place, replacement)


def _restore(module: nn.Module, place: str, replacement: Replacement) -> None:
    below = replacement.below
    if isinstance(below, Replacement) and not below.live:
        _restore(module, place, below)
    elif replacement.from_class and place == "forward":
        delattr(module, place)
    else:  # in accelerate's place there is always something
        setattr(module, place, below)


def itself(kept: T) -> T:
    """Return what is given; a stand-in reduces to this, so that a copy is one of what is kept."""
    return kept
