"""Closed configuration models and their one-line errors."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from moe_routing.errors import InputError


class ClosedModel(BaseModel):
    """A frozen model that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Model = TypeVar("Model", bound=ClosedModel)


def load_yaml(model: type[Model], path: Path | str) -> Model:
    """Read and validate a YAML file.

    Raises:
        InputError: the file is missing, not YAML, or breaks the schema.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return parse(model, values, str(path))


def parse(model: type[Model], values: object, origin: str) -> Model:
    """Validate ``values``; ``origin`` names the file in errors.

    Raises:
        InputError: one line for the first problem: file, key, value, what is allowed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{origin}: {_describe(error, model)}") from error


def _describe(error: ValidationError, model: type[BaseModel]) -> str:
    # An unknown key is the likeliest root of the other errors, so it goes first.
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    key = ".".join(str(part) for part in first["loc"]) or "(top level)"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(str(first['loc'][-1]), model)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("missing", "value_error"):
        return f"{key}: {message}{more}"
    return f"{key} is {first['input']!r}; {message[0].lower()}{message[1:]}{more}"


def _suggestion(word: str, model: type[BaseModel]) -> str:
    known = set(_keys(model.model_json_schema()))
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _keys(schema: object) -> list[str]:
    """Return every property name anywhere in a JSON schema."""
    if isinstance(schema, list):
        return [key for item in schema for key in _keys(item)]
    if not isinstance(schema, dict):
        return []
    own = list(schema.get("properties", {}))
    return own + [key for value in schema.values() for key in _keys(value)]
