"""The strategy of docs/adding-a-strategy.md works as the guide says, from another package too."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import blocks
from offered_strategies import forget, write_package

from moe_routing import parse_strategy, routed
from moe_routing.routing.strategies import families
from moe_routing.routing.types import RouterInputs

GUIDE = "docs/adding-a-strategy.md"


@pytest.fixture
def strategy(tmp_path, monkeypatch):
    """The strategy of the guide's config, offered by a package as the guide says."""
    code, _ = blocks(GUIDE, "python")
    (points,) = tomllib.loads(blocks(GUIDE, "toml")[0])["project"]["entry-points"].values()
    named = {name: f"toy_routing:{point.partition(':')[2]}" for name, point in points.items()}
    monkeypatch.syspath_prepend(write_package(tmp_path, code, **named))
    forget()
    (line,) = [line for line in blocks(GUIDE, "yaml")[0].splitlines() if line.startswith("  - ")]
    yield parse_strategy(line.removeprefix("  - "))
    monkeypatch.undo()
    forget()


def slow_count(logits: list[float], max_k: int) -> int:
    finite = sorted((value for value in logits if value > -np.inf), reverse=True)
    gaps = [a - b for a, b in zip(finite, [*finite[1:], -np.inf], strict=True)]
    gaps = gaps[: min(max_k, len(logits) - 1)]
    return 1 + gaps.index(max(gaps))


def test_the_experts_are_those_before_the_largest_gap(strategy):
    assert strategy.id == "gap_k8"
    assert families()["gap"] is type(strategy)
    logits_TE = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 16)).astype("float32"))
    logits_TE[:5, 3:] = -torch.inf
    select = strategy.selector(None, 16)
    selection = select(RouterInputs(0, logits_TE), logits_TE.softmax(-1))
    expected = [slow_count(row, 8) for row in logits_TE.tolist()]
    assert selection.count_T.tolist() == expected
    assert len(set(expected)) > 4
    for row, kept, count in zip(logits_TE, selection.index_TK, expected, strict=True):
        assert kept[:count].tolist() == row.argsort(descending=True)[:count].tolist()


def test_a_model_is_routed_by_it_and_by_a_control_of_it(strategy, model, tokenizer, monkeypatch):
    _, code = blocks(GUIDE, "python")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    before = model(**inputs).logits
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 2)
    exec(code, {"routed": routed, "model": model, "inputs": inputs})  # noqa: S102 (the guide's)
    assert torch.equal(model(**inputs).logits, before)
    for name in (strategy.id, f"shuffle.{strategy.id}"):
        with routed(model, name):
            assert not torch.equal(model(**inputs).logits, before)


def test_the_file_that_the_guide_names_is_where_strategies_are_found():
    folder = Path(families()["regular"].__module__.replace(".", "/")).parent
    assert f"`src/{folder}/`" in Path(__file__).parents[1].joinpath(GUIDE).read_text("utf-8")
