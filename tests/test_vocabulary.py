"""The vocabulary is complete, and each of its names stands once."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from moe_routing import vocabulary
from moe_routing.data.tasks import ITEM_MAKERS
from moe_routing.routing.nulls import NULLS
from moe_routing.vocabulary import DATASETS, DIVERGENCE, LOGIT_NULLS, METRICS, TASKS, task_of

SOURCE = Path(vocabulary.__file__).parent


def test_every_null_has_a_hypothesis_and_a_class():
    assert list(NULLS) == list(LOGIT_NULLS)
    assert all(LOGIT_NULLS.values())


def test_every_data_set_has_items_and_a_task():
    assert set(DATASETS) == set(ITEM_MAKERS)
    assert {task_of(name).name for name in DATASETS} == set(TASKS)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_task_is_measured_and_compared_by_known_metrics(task):
    assert set(task.metrics) | set(task.compared) | {DIVERGENCE.name} <= set(METRICS)
    assert {task.shown(name) for name in task.compared} <= set(task.metrics)
    # Differences are of what adds up over items, and have a unit.
    measures = [METRICS[name] for name in task.compared]
    assert all(measure.scale is None and measure.unit for measure in measures)
    assert task.examples.startswith(task.absent)


def test_what_a_study_lacks_names_the_data_sets_of_the_task():
    assert TASKS["perplexity"].examples == "running text (WikiText-2 or Wikipedia)"


@pytest.mark.parametrize(("higher", "loss"), [(True, -0.25), (False, 0.25)])
def test_the_loss_follows_the_direction_alone(higher, loss):
    for proportion in (True, False):
        metric = vocabulary.Metric(
            "m", "m", higher_is_better=higher, is_proportion=proportion, unit="units"
        )
        assert metric.loss(0.25) == loss
        assert metric.percent == (100 if proportion else 1)


def module_names(path: Path) -> list[str]:
    """The public names that a module defines: constants and classes."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names.append(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [t.id for t in targets if isinstance(t, ast.Name) and t.id.isupper()]
    return [name for name in names if not name.startswith("_")]


def test_each_name_of_the_vocabulary_and_each_class_has_one_meaning():
    defined = Counter(name for path in SOURCE.rglob("*.py") for name in module_names(path))
    words = [*module_names(SOURCE / "vocabulary.py"), "CONTROLS", "FAMILIES", "NULLS", "SHOWN"]
    repeated = {name for name in words if defined[name] > 1}
    repeated |= {name for name, n in defined.items() if n > 1 and not name.isupper()}
    assert repeated == set()
