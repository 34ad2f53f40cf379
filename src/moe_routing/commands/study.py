"""The study that a command line stands for: a config, as the workflow would read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_routing.config.study import StudyConfig
from moe_routing.data.public import PUBLIC_SOURCES
from moe_routing.errors import InputError
from moe_routing.routing.strategies import parse_strategy
from moe_routing.schema import parse
from moe_routing.vocabulary import DATASETS

if TYPE_CHECKING:
    from moe_routing.routing.strategies import Strategy

ORIGIN = "command line"
Values = dict[str, Any]


def local(path: str) -> Values:
    """Return a local file as a source."""
    return {"kind": "local", "path": path}


def task_sources(tasks: Sequence[str]) -> dict[str, Values]:
    """Return the sources of the sets among ``NAME`` and ``NAME=FILE``, by name, in their order.

    Raises:
        InputError: a name with a file is none of this package's sets, or is given twice.
    """
    found: dict[str, Values] = {}
    for task in tasks:
        name, equals, file = task.partition("=")
        if name not in DATASETS:
            if equals:
                raise InputError(
                    f"--tasks has '{task}'; allowed with a file: {', '.join(DATASETS)}"
                )
            continue
        if name in found:
            raise InputError(f"--tasks has '{name}' twice; allowed: each task once")
        if equals and not Path(file).is_file():
            raise InputError(f"--tasks has '{task}': no such file")
        found[name] = local(file) if equals else PUBLIC_SOURCES[name].model_dump(mode="json")
    return found


def study_values(
    name: str,
    model: Mapping[str, Any],
    sources: Mapping[str, Values],
    strategies: Sequence[str],
    *,
    text: Values,
    items: int | None = None,
    seed: int = 0,
    **calibration: object,
) -> Values:
    """Return the config of a study as plain values.

    Args:
        name: name of the study.
        model: the section ``model``.
        sources: source of each evaluation set.
        strategies: ids; the first is the baseline, and the second on the first set is the primary
            contrast.
        text: source of the calibration text.
        items: items of each set; None: all.
        seed: seed of the study.
        **calibration: other keys of the section ``calibration``.

    Raises:
        InputError: an unknown strategy.
    """
    parsed = {one: parse_strategy(one) for one in strategies}
    baseline = strategies[0]
    levers = [one for one, strategy in parsed.items() if _is_lever(strategy) and one != baseline]
    compared = [one for one in parsed if one not in levers]
    return {
        "study": name,
        "seed": seed,
        "model": dict(model),
        "calibration": {"source": text, "nulls": nulls_of(parsed.values()), **calibration},
        "datasets": {one: {"source": source, "items": items} for one, source in sources.items()},
        "strategies": compared,
        "levers": levers,
        "statistics": {
            "baseline": baseline,
            "primary": {"strategy": compared[:2][-1], "dataset": next(iter(sources))},
        },
    }


def parsed_study(values: Values) -> StudyConfig:
    """Return a config, checked.

    Raises:
        InputError: see :func:`moe_routing.schema.parse`.
    """
    return parse(StudyConfig, values, ORIGIN)


def nulls_of(strategies: Iterable[Strategy]) -> list[str]:
    """Return the ids of the nulls that strategies test against; the default one if none does."""
    nulls = dict.fromkeys(one.needs_null for one in strategies if one.needs_null)
    return list(nulls) or ["needed"]


def _is_lever(strategy: Strategy) -> bool:
    """Say whether a config takes a strategy among its levers only."""
    return strategy.family.static_weighting is not None and strategy.has_lever
