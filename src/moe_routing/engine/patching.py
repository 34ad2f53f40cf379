"""Forwards of modules, replaced temporarily.

Replacements stack: each one lies on top of the forward it found. Contexts may end in any order and
in any thread. The module then computes what it did before, and later replacements stay in place.
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

ATTRIBUTES = ("_old_forward", "forward")
"""Attributes that may hold a module's own forward. Accelerate moves it to the first; the second
then holds its hooks, which load weights and move inputs. A replacement lies below those hooks."""

_LOCK = threading.Lock()


class Replacement:
    """A forward that replaces another one, which lies below it.

    A copy of the module, made by ``copy`` or ``pickle``, gets the forward below: the copy is an
    independent model without the replacement.
    """

    def __init__(
        self, below: Forward, from_class: bool, make: Callable[[Forward], Forward], sole: str | None
    ) -> None:
        """Make the new forward; see :func:`patched_forward`.

        Args:
            below: the present forward.
            from_class: whether it is the class's forward, not an attribute of the module.
            make: from the present forward to the new one.
            sole: what the new one does, if a module takes only one such replacement.
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
def patched_forward(
    module: nn.Module, make: Callable[[Forward], Forward], sole: str | None = None
) -> Iterator[None]:
    """Replace a module's forward inside the context.

    Args:
        module: the module.
        make: from the present forward to the new one.
        sole: what the new one does, if a module takes only one such replacement at a time.

    Raises:
        InputError: ``sole`` is given, and another such replacement is active.
    """
    with _LOCK:
        replacement = _push(module, make, sole)
    try:
        yield
    finally:
        with _LOCK:
            _remove(module, replacement)


def replacements(module: nn.Module) -> Iterator[Replacement]:
    """Return the active replacements of a module's forward, the latest first."""
    for name in ATTRIBUTES:
        found = vars(module).get(name)
        while isinstance(found, Replacement):
            if found.live:
                yield found
            found = found.below


def sole_replacement(model: nn.Module) -> str | None:
    """Return the active sole replacement in a model, such as "routed by 'x'"."""
    found = (new.sole for module in model.modules() for new in replacements(module))
    return next((sole for sole in found if sole), None)


def own_forward(forward: Forward) -> Forward:
    """Return what lies below all replacements."""
    while isinstance(forward, Replacement):
        forward = forward.below
    return forward


def _push(module: nn.Module, make: Callable[[Forward], Forward], sole: str | None) -> Replacement:
    taken = next((found.sole for found in replacements(module) if found.sole), None)
    if sole and taken:
        raise InputError(
            f"the model is {taken} already; leave that context first: a model takes one at a time, "
            "whichever thread or wrapper asks"
        )
    name = next((name for name in ATTRIBUTES if name in vars(module)), ATTRIBUTES[-1])
    below, from_class = getattr(module, name), name not in vars(module)
    replacement = Replacement(below, from_class, make, sole)
    setattr(module, name, replacement)
    return replacement


def _remove(module: nn.Module, replacement: Replacement) -> None:
    """Remove a replacement; if another one lies on it, it only passes calls on from now on."""
    replacement.live, replacement.compute = False, replacement.below
    for name in ATTRIBUTES:
        if vars(module).get(name) is replacement:
            _restore(module, name, replacement)


def _restore(module: nn.Module, name: str, replacement: Replacement) -> None:
    below = replacement.below
    if isinstance(below, Replacement) and not below.live:
        _restore(module, name, below)
    elif replacement.from_class and name == "forward":
        delattr(module, name)
    else:  # accelerate's attribute is never absent
        setattr(module, name, below)


def itself(kept: T) -> T:
    """Return the argument. A wrapper reduces to this call, so a copy holds what it wraps."""
    return kept
