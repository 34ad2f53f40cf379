"""``moe-routing inspect``: what a model's routing is, and what works on it."""

from __future__ import annotations

import argparse

from moe_routing.commands.options import Subparsers, add_command, add_model, model_config

EXAMPLES = """\
  moe-routing inspect allenai/OLMoE-1B-7B-0924
  moe-routing inspect ./my-model
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = add_command(
        subparsers, "inspect", "family, experts and weighting of a model, and what works", EXAMPLES
    )
    add_model(parser)
    parser.set_defaults(run=run_inspect)


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print what the config of a model says; no weights are read or downloaded.

    Raises:
        InputError: no such model, an invalid config, or no supported router.
    """
    for name, value in describe_model(arguments).items():
        print(f"{name + ':':28}{value}")


def describe_model(arguments: argparse.Namespace) -> dict[str, str]:
    """Return properties of a model by name."""
    from moe_routing.engine.adapters import find_routers, why_not_one_by_one
    from moe_routing.engine.loading import config_file, skeleton
    from moe_routing.engine.packable import configured_window

    config = model_config(arguments)
    model = skeleton(config_file(config))
    routers = find_routers(model)
    rule = routers[0].rule
    layers = model.config.get_text_config().num_hidden_layers
    counts = [router.num_experts for router in routers]
    experts = str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))
    reason = why_not_one_by_one(model)
    return {
        "model": config.path + (f" at {config.revision}" if config.revision else ""),
        "family": f"{model.config.model_type} ({type(model).__name__})",
        "parameters": f"{model.num_parameters():,}",
        "layers": f"{layers}, of which {len(routers)} route and {layers - len(routers)} are dense",
        "experts per layer": experts,
        "experts per token": str(rule.top_k),
        "weighting": rule.weighting + (f", times {rule.factor:g}" if rule.factor != 1 else ""),
        "selected by": "more than its score: a bias or groups" if rule.biased else "score",
        "static strategies": ", ".join(
            f"stock_k{k}" for k in sorted({1, max(1, rule.top_k // 2), rule.top_k})
        ),
        "compensated, exact-norm": f"no: {reason}" if reason else "yes",
        "attention window": str(configured_window(model.config) or "none"),
    }
