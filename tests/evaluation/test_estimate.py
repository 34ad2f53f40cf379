"""An estimate of GPU hours, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_routing.config.cells import Cell
from moe_routing.config.study import load_config
from moe_routing.errors import InputError
from moe_routing.evaluation.estimate import (
    SIZES,
    Architecture,
    estimate,
    experts_of,
    read_architecture,
)
from moe_routing.vocabulary import DATASETS

ROOT = Path(__file__).parents[2]
OLMOE = {
    "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "vocab_size": 50304, "num_attention_heads": 16,
    "num_key_value_heads": 16,
}  # fmt: skip


def test_active_parameters_are_those_that_the_model_card_states():
    """1.3 billion, of which the embedding (50,304 x 2,048) is no computation."""
    active = Architecture.of(OLMOE).active_parameters(8)
    assert active + 50304 * 2048 == pytest.approx(1.28e9, rel=0.01)


def test_the_embedded_model_has_the_parameters_of_its_files():
    model = read_architecture(load_config(ROOT / "config/smoke.yaml").model)
    embedding = model.vocabulary * model.hidden
    # All experts, and the embedding; norms are not counted.
    assert model.active_parameters(64) + embedding == pytest.approx(15_868_032, rel=0.001)


def test_hours_follow_tokens_experts_and_speed():
    study, model = load_config(ROOT / "config/olmoe-1b-7b.yaml"), Architecture.of(OLMOE)
    sets = {one.dataset: one for one in estimate(study, model, 30)}
    hellaswag = sets["hellaswag"]
    assert hellaswag.cells == len(study.scored) + len(study.numerics)
    assert hellaswag.tokens == 10042 * 201
    all_experts = 2 * model.active_parameters(64) * hellaswag.tokens / 30e12 / 3600
    assert hellaswag.longest == pytest.approx(all_experts)
    assert hellaswag.hours < hellaswag.cells * all_experts
    fewer = {one.dataset: one for one in estimate(study, model, 60)}
    assert fewer["hellaswag"].hours == pytest.approx(hellaswag.hours / 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("stock", 8), ("regular_k2", 2), ("regular_k64", 64), ("bh_k64_a005", 8), ("bh_k4_a005", 4)],
)
def test_adaptive_rules_count_with_at_most_the_models_own_number(name, expected):
    study = load_config(ROOT / "config/olmoe-1b-7b.yaml")
    assert experts_of(study, Cell("cells", name, "lambada"), 8) == expected


def test_every_set_has_a_size():
    assert SIZES.keys() == DATASETS.keys()


def test_a_model_of_another_kind_is_named():
    with pytest.raises(InputError, match="key 'num_experts' is missing"):
        Architecture.of({key: OLMOE[key] for key in OLMOE if key != "num_experts"})


def test_the_script_says_what_a_study_takes(monkeypatch, run_script):
    monkeypatch.chdir(ROOT)
    code, said, errors = run_script("estimate.py", "config/smoke.yaml")
    assert code == 0, errors
    assert "lambada: 19 cells of 0.00 million tokens" in said
    assert "GPU hours at 30 teraflops, loading included" in said
