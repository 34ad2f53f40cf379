"""Find the families of strategies: those of this folder, and those of other packages.

Every concrete class of a module of this folder is a family, and so is every class that a package
registers as an entry point of the group ``moe_routing.strategies``. There is no other list of them.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from string import Formatter
from types import MappingProxyType
from typing import TypeVar

from moe_routing.errors import InputError
from moe_routing.routing.strategies.base import Strategy
from moe_routing.routing.strategies.controls import ControlStrategy
from moe_routing.vocabulary import (
    FAMILY_COLUMNS,
    RIVAL_KIND,
    STATIC_KIND,
    WEIGHTING_KIND,
    ControlKind,
    Family,
    Look,
    Weighting,
)

AnyStrategy = TypeVar("AnyStrategy", bound=Strategy)
GROUP = "moe_routing.strategies"
"""Group of the entry points under which other packages register strategies."""


@dataclass(frozen=True)
class Found:
    """A class and where it was found, in the words of error messages."""

    cls: type[Strategy]
    origin: str


def families() -> Mapping[str, type[Strategy]]:
    """Return all families of strategies except controls by name, those of static curves first.

    Raises:
        InputError: an entry point cannot be loaded, is not a strategy, or clashes with another
            family.
    """
    rules = [cls for cls in _found() if not issubclass(cls, ControlStrategy)]
    rules.sort(key=lambda cls: cls.family.static_weighting is None)
    return _by_name(rules)


def controls() -> Mapping[str, type[ControlStrategy]]:
    """Return all families of controls by name; raises the same errors as :func:`families`."""
    return _by_name([cls for cls in _found() if issubclass(cls, ControlStrategy)])


def known_families() -> dict[str, Family]:
    """Return the entries of all families, controls included, by name."""
    return {name: cls.family for name, cls in {**families(), **controls()}.items()}


def family_entry(name: str) -> Family:
    """Return the entry of a family by its name.

    Raises:
        InputError: there is no such family; the package that defines it may not be installed.
    """
    known = known_families()
    if name not in known:
        raise InputError(
            f"family '{name}' is not known here; known: {', '.join(known)} (others come with the "
            f"package that offers them as an entry point of '{GROUP}')"
        )
    return known[name]


def static_families() -> dict[Weighting, Family]:
    """Return the family of the static curve of each weighting that has one."""
    entries = (cls.family for cls in families().values())
    return {entry.static_weighting: entry for entry in entries if entry.static_weighting}


def control_kinds() -> dict[str, ControlKind]:
    """Return the kinds of controls by name, in the order of the reports."""
    made = [cls.control_kind() for cls in controls().values()]
    return {kind.name: kind for kind in (STATIC_KIND, *made, WEIGHTING_KIND, RIVAL_KIND)}


def _by_name(classes: list[type[AnyStrategy]]) -> Mapping[str, type[AnyStrategy]]:
    return MappingProxyType({cls.family.name: cls for cls in classes})


@functools.cache
def _found() -> tuple[type[Strategy], ...]:
    found: list[Found] = []
    for one in (*_own(), *_offered()):
        if problem := _problem(one.cls) or _clash(one.cls.family, found):
            raise InputError(f"{one.origin}: {problem}")
        found.append(one)
    return tuple(one.cls for one in found)


def _own() -> Iterator[Found]:
    """Yield the concrete classes of the modules of this folder, in order."""
    package = __name__.rpartition(".")[0]
    for info in pkgutil.iter_modules(import_module(package).__path__):
        module = import_module(f"{package}.{info.name}")
        for cls in vars(module).values():
            if _is_family(cls) and cls.__module__ == module.__name__:
                yield Found(cls, f"strategy {cls.__name__} of {module.__name__}")


def _offered() -> Iterator[Found]:
    """Yield the classes that other packages register, ordered by entry point name."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        origin = f"entry point '{point.name}' of '{GROUP}' ({_package(point)}, {point.value})"
        try:
            cls = point.load()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{origin}: cannot be loaded: {reason}") from error
        if not _is_family(cls):
            raise InputError(
                f"{origin}: is {cls!r}; allowed: a subclass of {Strategy.__module__}.Strategy "
                "without abstract methods"
            )
        yield Found(cls, origin)


def _package(point: EntryPoint) -> str:
    return f"package {point.dist.name}" if point.dist else "unknown package"


def _is_family(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, Strategy) and not inspect.isabstract(cls)


def _problem(cls: type[Strategy]) -> str | None:
    """Return why a class is not a valid family; None if it is."""
    entry = vars(cls).get("family")
    if not isinstance(entry, Family):
        return f"{cls.__name__} has family = {entry!r}; allowed: an entry of its own, a Family"
    return _incomplete(entry) or _bad_look(entry.look) or _wrong_kind(cls, entry)


def _incomplete(entry: Family) -> str | None:
    if not re.fullmatch(r"[a-z][a-z0-9]*", str(entry.name)):
        return f"the family's name is {entry.name!r}; allowed: lower-case letters and digits"
    for item in fields(entry):
        value = getattr(entry, item.name)
        if item.type == "str" and not (isinstance(value, str) and value.strip()):
            return f"family '{entry.name}' has {item.name} = {value!r}; allowed: non-empty text"
    named = {name for _, name, _, _ in Formatter().parse(entry.definition) if name is not None}
    if unknown := sorted(named - set(FAMILY_COLUMNS)):
        allowed = ", ".join(f"{{{name}}}" for name in FAMILY_COLUMNS)
        return f"family '{entry.name}': definition names {{{unknown[0]}}}; allowed: {allowed}"
    return None


def _bad_look(look: object) -> str | None:
    if not isinstance(look, Look):
        return f"look is {look!r}; allowed: a Look"
    if not re.fullmatch(r"#[0-9A-Fa-f]{6}", str(look.colour)):
        return f"colour is {look.colour!r}; allowed: six hexadecimal digits, such as '#0072B2'"
    return None if look.marker else f"marker is {look.marker!r}; allowed: a matplotlib marker"


def _wrong_kind(cls: type[Strategy], entry: Family) -> str | None:
    """Return what is wrong with the control kind: controls have one, with the family's name."""
    wanted = entry.name if issubclass(cls, ControlStrategy) else None
    given = entry.control.name if entry.control else None
    if wanted == given:
        return None
    allowed = (
        f"a ControlKind named '{wanted}'" if wanted else "None, since it is not a ControlStrategy"
    )
    return f"family '{entry.name}': control is {given!r}; allowed: {allowed}"


def _clash(entry: Family, found: list[Found]) -> str | None:
    """Return what a family shares with one found earlier but must not; None if nothing."""
    for other in found:
        theirs = other.cls.family
        only_one_controls = (entry.control is None) != (theirs.control is None)
        if only_one_controls and replace(entry, control=theirs.control) == theirs:
            continue  # a rule, and the control that applies it to the mean of another strategy
        for what, one, two in (
            ("name", entry.name, theirs.name),
            ("label", entry.label, theirs.label),
            ("colour", entry.look.colour.upper(), theirs.look.colour.upper()),
            ("marker", entry.look.marker, theirs.look.marker),
            ("static_weighting", entry.static_weighting, theirs.static_weighting),
        ):
            if one is not None and one == two:
                return f"{what} {one!r} is taken by {other.origin}; allowed: a unique one"
    return None
