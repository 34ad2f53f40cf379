"""Closed configuration models and their one-line errors."""

from __future__ import annotations

import difflib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from packaging.utils import InvalidName, canonicalize_name
from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from moe_routing.errors import InputError

# Text that becomes part of a path, a command, a URL or a page has one of the types below, so that a
# config cannot refer to a path outside its results folder or pass an option to a program.

_HUB_NAME = r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*"
_UNPRINTABLE = r"\x00-\x1f\x7f-\x9f`{}<>"
"""Not allowed in paths: braces are Snakemake wildcards, the others are markup in the report."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
HUB_ID = rf"^{_HUB_NAME}(/{_HUB_NAME})?$"
_FILE_PATH = rf"^[^{_UNPRINTABLE}]+$"
_PART = rf"\.?[A-Za-z0-9_][^/\\{_UNPRINTABLE}]*"
_MEMBER = rf"^{_PART}(/{_PART})*$"
_DEVICE = r"^[a-z]+(:[0-9]+)?$"
_COMMIT = r"^[0-9a-f]{40}$"
_SHA256 = r"^[0-9a-f]{64}$"

_ALLOWED = {
    NAME: "a letter or digit, then at most 63 letters, digits, '.', '_' or '-'",
    HUB_ID: "a Hugging Face Hub id, such as allenai/OLMoE-1B-7B-0924",
    _FILE_PATH: "a path without control characters and without any of ` { } < >",
    _MEMBER: "a path inside the wheel, with '/' between its parts and without '..'",
    _DEVICE: "a torch device, such as cpu, cuda or cuda:0",
    _COMMIT: "40 hexadecimal digits, in lower case",
    _SHA256: "64 hexadecimal digits, in lower case",
}
"""Descriptions of the patterns, for error messages."""


def _package_name(value: str) -> str:
    try:
        canonicalize_name(value, validate=True)
    except InvalidName as error:
        raise ValueError(f"'{value}'; allowed: a package name (PEP 508)") from error
    return value


def _package_version(value: str) -> str:
    # A local label may look like an archive (1.0+x.zip), which pip would read as a file.
    try:
        version = Version(value)
    except InvalidVersion:
        version = None
    if version is None or version.local:
        raise ValueError(f"{value!r:.120}; allowed: a public version (PEP 440), such as 0.9.0")
    return str(version)


Name = Annotated[str, Field(pattern=NAME)]
"""A name that becomes that of a file or folder, such as the name of a study."""

HubId = Annotated[str, Field(pattern=HUB_ID)]
FilePath = Annotated[str, Field(pattern=_FILE_PATH)]
ArchiveMember = Annotated[str, Field(pattern=_MEMBER)]
"""A path that cannot leave the archive."""

Device = Annotated[str, Field(pattern=_DEVICE)]
Commit = Annotated[str, Field(pattern=_COMMIT)]
Sha256 = Annotated[str, Field(pattern=_SHA256)]
PackageName = Annotated[Name, AfterValidator(_package_name)]
PackageVersion = Annotated[str, Field(max_length=64), AfterValidator(_package_version)]
"""A public PEP 440 version, in its normal form."""


MOST = 10**9
"""Bound of whole numbers that have no smaller one: what is larger is a slip."""

Count = Annotated[int, Field(ge=1, le=MOST)]
"""A number of things, at least one."""

Natural = Annotated[int, Field(ge=0, le=MOST)]
"""A number of things, possibly none, or a seed."""

Positive = Annotated[float, Field(gt=0, le=1e6)]
"""A quantity above 0."""


Item = TypeVar("Item")


def _distinct(values: list[Item]) -> list[Item]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"has {value!r:.120} twice; allowed: each value once")
    return values


Distinct = Annotated[list[Item], AfterValidator(_distinct)]
"""A list without repeated values."""


class ClosedModel(BaseModel):
    """A frozen model that rejects unknown keys, and numbers that are not finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


Model = TypeVar("Model", bound=ClosedModel)


def load_yaml(model: type[Model], path: Path | str) -> Model:
    """Read and validate a YAML file.

    Raises:
        InputError: the file is missing, not YAML, or breaks the schema.
    """
    return parse(model, read_yaml(path), str(path))


class _UniqueKeys(yaml.SafeLoader):
    """YAML without repeated keys, of which the loader would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key}' is given twice; allowed: each key once",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path | str) -> object:
    """Return the content of a YAML file: plain data, no Python objects.

    Raises:
        InputError: the file is missing or cannot be read, is not YAML, or has a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # noqa: S506, a safe loader
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise InputError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def parse(model: type[Model], values: object, origin: str) -> Model:
    """Validate ``values``, plain data; ``origin`` names the file in errors.

    Types are strict: ``true`` is no number, and neither is the text ``"8"``.

    Raises:
        InputError: one line for the first problem: file, key, value, what is allowed.
    """
    # By way of JSON, whose strict validation makes models of mappings. YAML's dates are text.
    try:
        text = json.dumps(values, default=str)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin}: not plain data: {error}") from error
    with _in_one_line(model, origin):
        return model.model_validate_json(text, strict=True)


def build(model: type[Model], values: Mapping[str, object], origin: str) -> Model:
    """Make a model of values that are objects already; ``origin`` names it in errors.

    Raises:
        InputError: as in :func:`parse`.
    """
    with _in_one_line(model, origin):
        return model.model_validate(values)


@contextmanager
def _in_one_line(model: type[BaseModel], origin: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        # A key or value in the config may contain line breaks.
        raise InputError(f"{origin}: {' '.join(_describe(error, model).split())}") from error


def _describe(error: ValidationError, model: type[BaseModel]) -> str:
    # An unknown key is the most likely cause of the other errors, so it goes first.
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    key = ".".join(str(part) for part in first["loc"]) or "(top level)"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(first['loc'], model)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("missing", "value_error"):
        return f"{key}: {message}{more}"
    allowed = _ALLOWED.get(first.get("ctx", {}).get("pattern", ""))
    wrong = f"allowed: {allowed}" if allowed else f"{message[0].lower()}{message[1:]}"
    return f"{key} is {first['input']!r:.120}; {wrong}{_new_name(first['input'])}{more}"


RENAMED = {"noise": "numerics", "audit": "ablation", "ragged": "dropless"}
"""Keys and values of earlier versions, and their current names."""

_EVERY = "the ablation reads the toggled experts of analysis.held_out"
REPLACED = {
    "ablation.tokens": "it is now analysis.held_out.tokens",
    "ablation.layers": f"{_EVERY}, in every layer",
    "ablation.context": f"{_EVERY}, in contexts of at most evaluation.window tokens",
    "ablation.horizon": f"{_EVERY}, and the loss of the next token only",
}
"""Keys of earlier versions without an equal, by the end of their path, and what replaced them."""


def _new_name(word: object) -> str:
    new = RENAMED.get(word) if isinstance(word, str) else None
    return f"; it is now called '{new}'" if new else ""


def _suggestion(loc: Sequence[str | int], model: type[BaseModel]) -> str:
    """Return the key that was meant, or the section that an existing key belongs to."""
    *above, word = map(str, loc)
    if (replaced := REPLACED.get(".".join([*above[-1:], word]))) is not None:
        return f"; {replaced}"
    if word in RENAMED:
        return _new_name(word)
    schema = model.model_json_schema()
    found = [path.rpartition(".") for path in _paths(schema, schema.get("$defs", {}))]
    if homes := [parent or "(top level)" for parent, _, key in found if key == word]:
        return f"; it is a key of {homes[0]}"
    section = next((part for part in reversed(above) if not part.isdigit()), "")
    siblings = [key for parent, _, key in found if parent.rpartition(".")[2] == section]
    if close := difflib.get_close_matches(word, siblings, n=1):
        return f"; did you mean '{close[0]}'?"
    others = {key: f"{parent}{dot}{key}" for parent, dot, key in reversed(found)}
    close = difflib.get_close_matches(word, others, n=1, cutoff=0.8)
    return f"; did you mean '{others[close[0]]}'?" if close else ""


def _paths(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[str]:
    """Yield the path of every key of a JSON schema, such as ``datasets.<name>.items``."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    for key, inner in schema.get("properties", {}).items():
        yield key
        yield from (f"{key}.{path}" for path in _paths(inner, definitions))
    if isinstance(inner := schema.get("additionalProperties"), dict):
        yield from (f"<name>.{path}" for path in _paths(inner, definitions))
    parts = [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())]
    for part in [*parts, *([schema["items"]] if "items" in schema else ())]:
        yield from _paths(part, definitions)
