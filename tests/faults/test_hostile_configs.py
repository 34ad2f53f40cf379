"""Configs with one hostile value or key anywhere: valid, or one line that names file and key.

The places come from the schema, so that a new key is covered by itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_pretraining.settings import PretrainConfig
from moe_routing.config.study import StudyConfig
from moe_routing.errors import InputError
from moe_routing.schema import ClosedModel, load_yaml, parse

ROOT = Path(__file__).resolve().parents[2]
CONFIGS: dict[str, type[ClosedModel]] = {
    "config.yaml": StudyConfig,
    "olmoe-1b-7b.yaml": StudyConfig,
    "pretrain.yaml": PretrainConfig,
}
HOSTILE = [
    None, True, False, -1, 0, 1, 0.5, -0.0, 1e-320, 1e308, 10**14, 10**400, "", " ", "8", "true",
    "null", "..", ".", "/", "-rf", "$(id)", "`id`", "it's", '"', "a" * 300, "\x00", "é", "\ud7ff",
    "a\nb", "{study}", "<script>", [], [[]], [1, 1], ["a", "a"], [None], {}, {"a": 1},
    {"kind": "local"}, "2026-11-28",
]  # fmt: skip


def complete(name: str) -> dict:
    """Return a shipped config with every default written out: all keys that can be wrong."""
    model = load_yaml(CONFIGS[name], ROOT / "config" / name)
    return model.model_dump(mode="json")


def places(values: object, above: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every key and of every entry of a list."""
    pairs = (
        values.items()
        if isinstance(values, dict)
        else enumerate(values)
        if isinstance(values, list)
        else ()
    )
    for key, inner in pairs:
        yield (*above, key)
        yield from places(inner, (*above, key))


COMPLETE = {name: complete(name) for name in CONFIGS}
PLACES = [(name, path) for name, values in COMPLETE.items() for path in places(values)]


def changed(name: str, path: tuple, value: object, *, key: str | None) -> dict:
    values = copy.deepcopy(COMPLETE[name])
    *above, last = path
    section = values
    for part in above:
        section = section[part]
    if key is not None and isinstance(section, dict):
        section[key] = section.pop(last)
    else:
        section[last] = value
    return values


@settings(max_examples=300, derandomize=True, database=None)
@given(
    place=st.sampled_from(PLACES),
    value=st.sampled_from(HOSTILE),
    key=st.one_of(st.none(), st.none(), st.sampled_from(["tokenz", "", "..", "\x00", "Items"])),
)
def test_a_hostile_value_is_refused_in_one_line_or_harmless(place, value, key):
    name, path = place
    values = changed(name, path, value, key=key)
    try:
        parse(CONFIGS[name], values, "mine.yaml")
    except InputError as error:
        message = str(error)
        assert message.startswith("mine.yaml: ")
        assert "\n" not in message
        assert len(message) < 2000
        assert "Traceback" not in message


def numbers(schema: dict, definitions: dict, path: str = "") -> Iterator[tuple[str, dict]]:
    """Yield every number of a JSON schema with its path."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if schema.get("type") in ("integer", "number"):
        yield path, schema
    for key, inner in schema.get("properties", {}).items():
        yield from numbers(inner, definitions, f"{path}.{key}")
    inner = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    for key in ("items", "additionalProperties"):
        inner += [schema[key]] if isinstance(schema.get(key), dict) else []
    for part in inner:
        yield from numbers(part, definitions, path)


@pytest.mark.parametrize("model", [StudyConfig, PretrainConfig])
def test_every_number_has_two_bounds(model):
    schema = model.model_json_schema()
    found = dict(numbers(schema, schema["$defs"]))
    assert len(found) > 20
    unbounded = [
        path
        for path, number in found.items()
        if not (
            {"minimum", "exclusiveMinimum"} & number.keys()
            and {"maximum", "exclusiveMaximum"} & number.keys()
        )
    ]
    assert unbounded == []


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("statistics.resamples", 10**14, "statistics.resamples is 100000000000000; input should"),
        ("calibration.nulls", ["needed", "needed"], "calibration.nulls: has 'needed' twice"),
        ("analysis.bh.alpha", [0.05, 0.05], "analysis.bh.alpha: has 0.05 twice; allowed: each"),
        ("seed", True, "seed is True; input should be a valid integer"),
        ("seed", "8", "seed is '8'; input should be a valid integer"),
    ],
)
def test_value_and_key_are_named(path, value, expected):
    values = changed("config.yaml", tuple(path.split(".")), value, key=None)
    with pytest.raises(InputError) as caught:
        parse(StudyConfig, values, "mine.yaml")
    assert str(caught.value).startswith(f"mine.yaml: {expected}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 5000,
        "a: [",
        "a: &b [*b]",
        "!!python/object/apply:os.system [id]",
        "a: 1\na: 2",
        "\x00",
        "- a",
    ],
)
def test_yaml_that_is_no_config_is_one_line(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_yaml(StudyConfig, path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"study: \xff\xfe")
    with pytest.raises(InputError, match=r"mine\.yaml: not valid YAML: "):
        load_yaml(StudyConfig, path)


def test_what_is_valid_stays_valid():
    for name, values in COMPLETE.items():
        text = yaml.safe_dump(json.loads(json.dumps(values)))
        assert parse(CONFIGS[name], yaml.safe_load(text), name).model_dump(mode="json") == values
