"""``moe-routing new-study``: write a config for a model that the workflow runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moe_routing.commands.options import (
    Subparsers,
    add_command,
    add_model,
    model_values,
    parsed_model,
    positive,
)
from moe_routing.commands.study import local, parsed_study, study_values, task_sources
from moe_routing.config.limits import Limits, check_limits
from moe_routing.data.public import PUBLIC_SOURCES
from moe_routing.errors import InputError
from moe_routing.files import atomic_path

if TYPE_CHECKING:
    from moe_routing.routing.rule import ModelRule

EXAMPLES = """\
  moe-routing new-study allenai/OLMoE-1B-7B-0924 --out config/mine.yaml
  moe-routing new-study ./my-model --tasks wikipedia hellaswag=my-items.jsonl --limit 500
  snakemake --cores all --configfile config/mine.yaml
"""
STATIC = {"softmax": "regular", "renormalised": "normalized"}
"""The family of the static curve of a model, by its own weighting."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = add_command(subparsers, "new-study", "write a study config for your model", EXAMPLES)
    add_model(parser)
    parser.add_argument(
        "--tasks", nargs="+", default=["wikipedia", "hellaswag", "lambada"], metavar="SET[=FILE]",
        help="evaluation sets, from a local file if one is given "
        "(default: wikipedia hellaswag lambada)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="items of each set (default: all)"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="calibration text (default: Wikipedia passages)"
    )
    parser.add_argument("--name", default="mine", help="name of the study (mine)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write (config/<name>.yaml)"
    )
    parser.set_defaults(run=run_new_study)


def run_new_study(arguments: argparse.Namespace) -> None:
    """Write the config, checked against the model's own config.

    Raises:
        InputError: no such model, an unsupported one, or a file that exists already.
    """
    from moe_routing.engine.adapters import find_routers
    from moe_routing.engine.loading import config_file, skeleton
    from moe_routing.engine.requests import max_length

    out = arguments.out or Path("config") / f"{arguments.name}.yaml"
    if out.exists():
        raise InputError(f"{out}: exists already; allowed: a new file (--out FILE)")
    sources = task_sources(arguments.tasks)
    unknown = [task for task in arguments.tasks if task.partition("=")[0] not in sources]
    if unknown:
        raise InputError(
            f"--tasks has '{unknown[0]}'; allowed in a study: {', '.join(PUBLIC_SOURCES)}"
        )
    model_section = model_values(arguments)
    model = skeleton(config_file(parsed_model(model_section)))
    routers = find_routers(model)
    rule, experts = routers[0].rule, min(router.num_experts for router in routers)
    text = PUBLIC_SOURCES["wikipedia"].model_dump(mode="json")
    values = study_values(
        arguments.name,
        model_section,
        sources,
        strategies_for(rule, experts),
        text=local(str(arguments.text)) if arguments.text else text,
        items=arguments.limit,
    )
    study = parsed_study(values)
    window = max_length(model.config, None)
    check_limits(study, Limits(experts, rule, window), str(out))
    values["resources"] = {"gpu": int(study.model.device.startswith("cuda"))}
    head = (
        "# A study of your model; config/README.md explains every key, also those left out.\n"
        f"# Run it: snakemake --cores all --configfile {out}\n"
    )
    with atomic_path(out) as temporary:
        temporary.write_text(head + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    print(f"{out}: written; run it with: snakemake --cores all --configfile {out}")


def strategies_for(rule: ModelRule, experts: int) -> list[str]:
    """Return the ids that a first study of a model compares, the baseline first.

    Args:
        rule: the model's own routing rule.
        experts: number of experts per layer.
    """
    top_k, static = rule.top_k, STATIC[rule.weighting]
    fewer = sorted({max(1, top_k // 4), max(1, top_k // 2), max(1, 3 * top_k // 4)} - {top_k})
    more = [2 * top_k] if 2 * top_k <= experts else []
    return [
        "stock",
        f"bh_k{top_k}_a005",
        *(f"{static}_k{k}" for k in (*fewer, top_k, *more)),
        f"certified_k{top_k}_m001",
    ]
