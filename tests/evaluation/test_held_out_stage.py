"""Interventions on held-out text, as files, against whole forward passes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from whole_documents import prediction, slow_change, without

from moe_routing.config.study import StudyConfig
from moe_routing.data.items import Item, write_items
from moe_routing.engine.adapters import find_routers
from moe_routing.engine.requests import Encoder
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError
from moe_routing.evaluation.held_out import (
    Job,
    describe_tokens,
    toggle_dead,
    toggle_held_out,
    toggle_routed_states,
)
from moe_routing.evaluation.held_out_files import HeldOutFiles
from moe_routing.evaluation.study_model import write_model
from moe_routing.evaluation.together import kept_by_strategy, ordered_sets, own_experts
from moe_routing.evaluation.toggles import choose_tokens
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.toggles import Toggles
from moe_routing.workflow import write_config

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"tokens": 6, "dataset_tokens": 4, "dead_experts": 3, "dead_tokens": 20}


@pytest.fixture(scope="module")
def results(tmp_path_factory, nano, calibration, rows):
    """A study of the embedded model that is calibrated."""
    folder = tmp_path_factory.mktemp("study")
    source = {"kind": "local", "path": "unused"}
    config = StudyConfig.model_validate({
        "study": "small",
        "model": {"path": str(ROOT / "resources" / "olmoe-nano")},
        "calibration": {"source": source},
        "datasets": {"lambada": {"source": source}, "wikipedia": {"source": source}},
        "strategies": ["stock", "bh_k8_a005"],
        "statistics": {"primary": {"strategy": "bh_k8_a005", "dataset": "wikipedia"}},
        "analysis": {"held_out": SETTINGS, "validity": {"alpha": [0.05]}},
    })  # fmt: skip
    write_config(config, folder / "config.yaml")
    write_model(config, folder, "study.yaml")
    calibration.save(folder / "calibration")
    write_documents(folder, rows)
    job = Job.load(folder)
    for text in config.held_out_texts:
        toggle_held_out(job, text)
    toggle_routed_states(job)
    toggle_dead(job)
    return folder


def write_documents(folder, rows):
    texts = (ROOT / "tests/data_files/calibration.txt").read_text(encoding="utf-8").split("\n\n")
    (folder / "data").mkdir(exist_ok=True)
    for name, part in (("calibration", texts[:40]), ("certification", texts[40:45])):
        pd.DataFrame({"id": part, "text": part}).to_parquet(folder / "data" / f"{name}.parquet")
    contexts = [row["text"].rsplit(" ", 1)[0] for row in rows("lambada")[:6]]
    items = [Item(text, text, text, (" x",), 0) for text in contexts]
    write_items(items, folder / "data" / "lambada.parquet")


@pytest.fixture(scope="module")
def files(results):
    return HeldOutFiles(results)


def document(nano, results, text, index):
    """Return the token ids of a document as the model reads it."""
    name, column = ("certification", "text") if text == "calibration" else (text, "context")
    words = pd.read_parquet(results / "data" / f"{name}.parquet")[column][index]
    ids = nano.tokenizer(words)["input_ids"]
    return torch.tensor([nano.tokenizer.bos_token_id, *ids])[:257]


def kl(stock_V, other_V):
    return float((stock_V.exp() * (stock_V - other_V)).sum())


@pytest.mark.parametrize("text", ["calibration", "lambada"])
def test_what_is_removed_together_is_what_whole_passes_say(nano, results, files, text):
    toggles = Toggles.load(files.toggles(text))
    tokens, table = (pd.read_parquet(path(text)) for path in (files.tokens, files.together))
    count = SETTINGS["tokens" if text == "calibration" else "dataset_tokens"]
    assert table.groupby(["order", "layer"]).size()["bh"].tolist() == [count] * 17
    for order in ("effect", "exact_norm", "norm", "router"):
        assert table[table["order"] == order].groupby("k").size().to_dict() == dict.fromkeys(
            (2.0, 3.0, 4.0), count
        )
    arm, calibration = parse_strategy("bh_k8_a005"), calibration_of(results)
    own_LTE = own_experts(toggles)
    removed_LTE = own_LTE & ~kept_by_strategy(arm, calibration, toggles)
    for token in (0, count - 1):
        place = tokens.iloc[token]
        ids_S = document(nano, results, text, place["document"])
        stock_V = prediction(nano.model, ids_S, place["position"])
        target = int(ids_S[place["position"] + 1])
        assert place["loss"] == pytest.approx(-float(stock_V[target]), abs=1e-5)
        rows = table[(table["token"] == token) & (table["order"] == "bh")].set_index("layer")
        for layer, among in {"0": [0], "9": [9], "all": range(16)}.items():
            other_V = without(nano.model, ids_S, place["position"], removed_LTE[:, token], among)
            row = rows.loc[layer]
            assert row["kl"] == pytest.approx(kl(stock_V, other_V), rel=0.01, abs=1e-8)
            change = float((stock_V - other_V)[target])
            assert row["loss_change"] == pytest.approx(change, rel=0.01, abs=1e-5)
            there_P = (toggles.token_P == token) & torch.isin(toggles.layer_P, torch.tensor(among))
            there_P &= removed_LTE[toggles.layer_P, toggles.token_P, toggles.expert_P]
            assert row["removed"] == int(removed_LTE[among, token].sum()) == int(there_P.sum())
            assert row["k"] == 8 - row["removed"] / len(among)
            assert row["sum_kl"] == pytest.approx(float(toggles.kl_P[there_P].sum()))
    assert table["kl"].max() > 1e-3


def calibration_of(results):
    from moe_routing.routing.calibration import Calibration

    return Calibration.for_strategies(results / "calibration", parse_strategy("bh_k8_a005"))


def test_orders_keep_the_largest(nano, results, files):
    toggles, outputs = Toggles.load(files.toggles("calibration")), calibration_of(results).outputs
    sets = {(one.order, int(one.kept_LTE[0, 0].sum())): one.kept_LTE for one in ordered_sets(
        toggles, outputs
    )}  # fmt: skip
    assert len(sets) == 4 * 3
    for layer, token in ((0, 0), (7, 3), (15, 5)):
        here = [
            pair
            for pair in range(len(toggles.rank_P))
            if (toggles.layer_P[pair], toggles.token_P[pair]) == (layer, token)
            and toggles.rank_P[pair] < 8
        ]
        experts = toggles.expert_P[here].tolist()
        weight = toggles.weight_LTE[layer, token, experts].tolist()
        size = toggles.norm_LTE[layer, token, experts].tolist()
        log_size = (
            toggles.hidden_LTH[layer, token] @ outputs.slope_LEH[layer, experts].T
            + outputs.offset_LE[layer, experts]
        ).tolist()
        values = {
            "router": weight,
            "exact_norm": [w * n for w, n in zip(weight, size, strict=True)],
            "norm": [np.log(w) + n for w, n in zip(weight, log_size, strict=True)],
            "effect": toggles.kl_P[here].tolist(),
        }
        for order, value in values.items():
            best = sorted(zip(value, experts, strict=True), reverse=True)
            for k in (2, 3, 4):
                kept = sets[order, k][layer, token].nonzero()[:, 0].tolist()
                assert sorted(expert for _, expert in best[:k]) == kept


def test_a_strategy_keeps_what_it_routes_by(nano, results, files):
    """In the first layer, whose states are those of the stock model."""
    toggles, calibration = Toggles.load(files.toggles("calibration")), calibration_of(results)
    arm = parse_strategy("bh_k8_a005")
    kept_LTE = kept_by_strategy(arm, calibration, toggles)
    seen = []
    places = pd.read_parquet(files.tokens("calibration"))[["document", "position"]]
    with routed(nano.model, arm, calibration=calibration):
        hook = find_routers(nano.model)[0].module.register_forward_hook(
            lambda _, __, out: seen.append(out[2])
        )
        for token, (index, position) in enumerate(places.itertuples(index=False)):
            prediction(nano.model, document(nano, results, "calibration", index), position)
            chosen = [expert for expert in seen[-1][-1].tolist() if expert < 64]
            assert sorted(chosen) == kept_LTE[0, token].nonzero()[:, 0].tolist()
        hook.remove()
    static_LTE = kept_by_strategy(parse_strategy("regular_k3"), calibration, toggles)
    own_P = toggles.rank_P < 3
    pairs = (toggles.layer_P[own_P], toggles.token_P[own_P], toggles.expert_P[own_P])
    assert static_LTE[pairs].all()
    assert static_LTE.sum() == own_P.sum()
    exact = kept_by_strategy(parse_strategy("regular_k3_exact-norm"), calibration, toggles)
    best_LTE = toggles.weight_LTE * toggles.norm_LTE
    assert torch.equal(exact, best_LTE >= best_LTE.topk(3, -1).values[..., -1:])


def test_removals_in_routed_states_are_those_of_whole_routed_passes(nano, results, files):
    toggles, calibration = Toggles.load(files.routed), calibration_of(results)
    arm = parse_strategy("bh_k8_a005")
    count_LT = torch.zeros(16, SETTINGS["dataset_tokens"], dtype=torch.int64).index_put_(
        (toggles.layer_P, toggles.token_P), torch.ones_like(toggles.rank_P), accumulate=True
    )
    assert count_LT.min() >= 1
    assert count_LT.max() <= 8
    assert len(count_LT.unique()) > 3
    assert (toggles.sampling_weight_P == 1).all()
    rng = np.random.default_rng(0)
    with routed(nano.model, arm, calibration=calibration):
        for pair in rng.choice(len(toggles.rank_P), 8, replace=False).tolist():
            layer, position = int(toggles.layer_P[pair]), int(toggles.position_P[pair])
            ids_S = document(nano, results, "calibration", int(toggles.document_P[pair]))
            expert = int(toggles.expert_P[pair])
            change_S = slow_change(nano.model, ids_S[: position + 2], position, layer, expert)
            found = float(toggles.loss_change_P[pair])
            assert found == pytest.approx(float(change_S[position]), rel=0.01, abs=2e-5)
            own_E = toggles.logits_LTE[layer, toggles.token_P[pair]].argsort(descending=True)
            assert int(own_E[toggles.rank_P[pair]]) == expert or arm.score is None
    assert toggles.kl_P.max() > 1e-4
    assert toggles.compensated_kl_P.isnan().all()


def test_removing_a_dead_expert_changes_nothing(files):
    experts = pd.read_csv(files.dead_experts)
    assert experts.groupby("layer").size().tolist() == [SETTINGS["dead_experts"]] * 16
    assert len(experts.drop_duplicates()) == len(experts)
    dead_LE = torch.zeros(16, 64, dtype=torch.bool)
    dead_LE[experts["layer"].tolist(), experts["expert"].tolist()] = True
    for part in ("calibration", "held_out"):
        toggles = Toggles.load(files.dead(part))
        dead_P = dead_LE[toggles.layer_P, toggles.expert_P]
        assert 0 < dead_P.sum() < len(dead_P) / 4
        assert toggles.kl_P[dead_P].max() < 1e-9
        assert toggles.kl_P[~dead_P].median() > 1e-7
        dead_LTE = dead_LE[:, None].expand_as(toggles.norm_LTE)
        assert torch.equal(toggles.norm_LTE == 0, dead_LTE)
        assert torch.equal(toggles.deviation_LTE == 0, dead_LTE)
        assert toggles.logits_LTE.shape[1] == SETTINGS["dead_tokens"]


def test_another_run_writes_the_same_bytes(results, files, tmp_path):
    paths = [path("lambada") for path in (files.toggles, files.tokens, files.together)]
    before = [path.read_bytes() for path in paths]
    toggle_held_out(Job.load(results), "lambada")
    assert [path.read_bytes() for path in paths] == before


def test_substitutes_are_measured_if_a_null_is_about_them(results, files, nano, rows):
    toggles = Toggles.load(files.toggles("calibration"))
    own_P = toggles.rank_P < 8
    assert toggles.compensated_kl_P[own_P].isnan().all()
    assert torch.equal(toggles.compensated_kl_P[~own_P], toggles.kl_P[~own_P])
    constant_L, none_L = toggles.consequence_constants
    assert constant_L.isfinite().all()
    assert none_L.isnan().all()


def study_with(results, folder, **held_out):
    """Return a folder with the same study under other settings."""
    import yaml

    for name in ("model.json", "calibration", "data"):
        (folder / name).symlink_to(results / name)
    values = yaml.safe_load((results / "config.yaml").read_text())
    nulls = held_out.pop("nulls", values["calibration"]["nulls"])
    values["calibration"]["nulls"] = nulls
    values["analysis"]["held_out"] |= held_out
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_a_null_about_substitutes_has_them_measured(results, tmp_path):
    folder = study_with(results, tmp_path, nulls=["needed", "needed_compensated"], dataset_tokens=2)
    toggle_held_out(Job.load(folder), "lambada")
    toggles = Toggles.load(HeldOutFiles(folder).toggles("lambada"))
    assert toggles.compensated_kl_P.isfinite().all()


@pytest.mark.parametrize(
    ("key", "work", "text"),
    [
        ("tokens", lambda job: toggle_held_out(job, "calibration"), "toggles/calibration"),
        ("dataset_tokens", lambda job: toggle_held_out(job, "lambada"), "toggles/lambada"),
        ("dataset_tokens", toggle_routed_states, "routed"),
        ("dead_tokens", toggle_dead, "dead/calibration"),
    ],
)
def test_too_few_tokens_name_the_key(results, tmp_path, key, work, text):
    folder = study_with(results, tmp_path, **{key: 100000})
    with pytest.raises(InputError) as caught:
        work(Job.load(folder))
    message = str(caught.value)
    assert message.startswith(f"text of held_out/{text} has ")
    assert message.endswith(f"tokens each; analysis.held_out.{key} is 100000")


def test_an_unknown_text_is_one_line(results):
    with pytest.raises(InputError, match=r"^text 'wikipedia' is unknown; allowed: calibration, la"):
        toggle_held_out(Job.load(results), "wikipedia")


def test_calibration_documents_are_not_held_out(results, tmp_path):
    folder = study_with(results, tmp_path)
    (folder / "data").unlink()
    (folder / "data").mkdir()
    for name in ("calibration", "certification"):
        text = (results / "data" / "calibration.parquet").read_bytes()
        (folder / "data" / f"{name}.parquet").write_bytes(text)
    with pytest.raises(InputError, match=r"certification.parquet: 40 of 40 documents are calib"):
        toggle_held_out(Job.load(folder), "calibration")


def test_tokens_are_described(nano):
    encoder = Encoder(nano.tokenizer, 256)
    text = "The river Thames, in London.\nIt flows on."
    probe = choose_tokens(encoder, [text], 9, np.random.default_rng(0))[0]
    every = replace(probe, positions=tuple(range(len(probe.ids_S) - 1)))
    table = describe_tokens(encoder, [every], [text, text, "river"])
    whole = "".join(table["token"][1:])
    assert text.startswith(whole)
    assert len(text) - len(whole) < 6  # the last token is only predicted
    assert table["position"].tolist() == list(range(len(table)))
    assert table["frequency"][0] == 3
    assert (table["frequency"][1:] >= 2).all()
    starts = table.loc[table["word_start"], "token"].str.strip()
    words = text.replace(",", "").replace(".", "").split()
    assert len(starts) == len(words) == 8
    for word, start in zip(words, starts, strict=True):
        assert word.startswith(start)
    assert not table["word_start"][0]


def test_files_are_those_of_the_workflow(results, files):
    from moe_routing.config.study import load_config

    for path in files.all(load_config(results / "config.yaml")):
        assert Path(path).is_file(), path
    assert json.loads((results / "model.json").read_text())["num_experts"] == 64
