"""The config reference, generated from the config models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moe_routing.config.study import StudyConfig
from moe_routing.schema import MOST

INTRODUCTION = """# Configuration

| file | what it runs |
|---|---|
| `config.yaml` | the default study: the embedded model, minutes on a laptop |
| `olmoe-1b-7b.yaml` | the study of OLMoE-1B-7B-0924 on the complete sets, one GPU per job |
| `smoke.yaml` | the same workflow on a few items, in a minute or two |
| `pretrain.yaml` | training of the embedded model, from local text files |
| `pretrain-next.yaml` | training of its next version from random weights, about a day on one core |
| `pretrain-hub.yaml` | training of the same architecture on data sets from the Hugging Face Hub |
| `card.yaml` | the benchmarks for its model card, including WikiText-2 |

`snakemake --configfile FILE` replaces the default file; it does not extend it. A config is checked
before any job runs: an unknown key, a wrong type or a value out of range ends the run with one
line. Whole numbers are at most 10⁹, others at most 10⁶, unless a smaller bound is given. The first
job downloads the model, checks its files, and checks that it meets the demands of the config, such
as having `max_k` experts. `python scripts/config_reference.py` generates the
tables below from the code.

In a folder that snakedeploy has made from a clone, edit `config/config.yaml`: there a file given on
the command line extends it. `README.md` of the repository says how to deploy, under "Elsewhere".

A name (of a study, a pretraining run, a numerics arm, a text source) begins with a letter or digit
and has at most 64 letters, digits, `.`, `_` and `-`. A run writes to `results/<name>/` only;
downloads are kept in `results/.wheels` (wheels) and in the Hub's own cache.

A config is data: none of its values is executed, and neither is any code in a wheel. There is one
exception, in Snakemake itself: it treats a config file with the key `__use_yte__` as a template and
evaluates the Python code in it before it reads the workflow, even in a dry run. The workflow
rejects such a file, but only after that. Check for this key in any config that you did not write.
"""


def reference_files(pretraining: type[BaseModel]) -> dict[str, str]:
    """Return the text of each reference file, keyed by its path in the repository.

    Args:
        pretraining: the config model of a pretraining run, which this package does not import.
    """
    readme = INTRODUCTION
    for title, model in (("A study", StudyConfig), ("Pretraining", pretraining)):
        readme += f"\n## {title}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
        readme += "".join(f"| {' | '.join(row)} |\n" for row in _rows(model, "", set()))
    return {
        "config/README.md": readme,
        "workflow/schemas/config.schema.json": _schema(StudyConfig),
        "workflow/schemas/pretrain.schema.json": _schema(pretraining),
    }


def _schema(model: type[BaseModel]) -> str:
    return json.dumps(model.model_json_schema(), indent=2) + "\n"


def _rows(
    model: type[BaseModel], prefix: str, seen: set[type[BaseModel]]
) -> Iterator[tuple[str, str, str, str]]:
    """Yield the table rows of a model; nested models in ``seen`` are not listed again."""
    for name, field in model.model_fields.items():
        description = (field.description or "").replace("|", "\\|")
        yield f"`{prefix}{name}`", _type(field), _default(field), description
        for label, inner in _models(field.annotation, f"{prefix}{name}"):
            if inner not in seen:
                seen.add(inner)
                yield from _rows(inner, f"{label}.", seen)


def _models(annotation: object, label: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the models nested in a type, each with its key."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")
        tag = f" ({get_args(kind.annotation)[0]})" if kind else ""
        yield f"{label}{tag}", annotation
    elif get_origin(annotation) is dict:
        yield from _models(get_args(annotation)[1], f"{label}.<name>")
    elif get_origin(annotation) is list:
        yield from _models(get_args(annotation)[0], f"{label}[]")
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _models(part, label)
    elif get_origin(annotation) is Annotated:
        yield from _models(get_args(annotation)[0], label)


def _type(field: FieldInfo) -> str:
    def name(annotation: object) -> str:
        origin = get_origin(annotation)
        if annotation is NoneType:
            return "null"
        if origin is Annotated:
            return name(get_args(annotation)[0])
        if origin in (Union, UnionType):
            return " or ".join(dict.fromkeys(name(part) for part in get_args(annotation)))
        if origin is list:
            return f"list of {name(get_args(annotation)[0])}"
        if origin is dict:
            return "mapping"
        if isinstance(annotation, type):
            return "mapping" if issubclass(annotation, BaseModel) else annotation.__name__
        return ", ".join(f"`{value}`" for value in get_args(annotation))

    bounds = [
        str(item) for item in field.metadata if type(item).__name__ in ("Ge", "Gt", "Le", "Lt")
    ]
    limits = [b.split("(")[1].rstrip(")").replace("ge=", "≥ ").replace("gt=", "> ")
              .replace("le=", "≤ ").replace("lt=", "< ") for b in bounds
              if b not in (f"Le(le={MOST})", "Le(le=1000000.0)")]  # fmt: skip
    return " ".join([name(field.annotation), *limits])


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "see below"
    return "required" if field.default is PydanticUndefined else f"`{json.dumps(field.default)}`"
