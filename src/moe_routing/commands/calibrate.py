"""``moe-routing calibrate``: fit what strategies need to know of a model, on your own text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.commands.options import (
    Subparsers,
    add_calibration,
    add_command,
    add_model,
    loaded_model,
    model_config,
    read_texts,
)
from moe_routing.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.strategies import Strategy

EXAMPLES = """\
  moe-routing calibrate allenai/OLMoE-1B-7B-0924 --text notes.txt --margin 0.01 --out calibrated
  moe-routing calibrate ./my-model --text docs.jsonl --strategies bh_k8_a005 --out calibrated
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = add_command(
        subparsers, "calibrate", "fit nulls, thresholds and certificates on text", EXAMPLES
    )
    add_model(parser)
    parser.add_argument(
        "--text", type=Path, required=True, metavar="FILE",
        help="documents of the kind that the model will read: .txt with blank lines between them, "
        ".jsonl or .parquet with a column 'text'",
    )  # fmt: skip
    parser.add_argument(
        "--margin", type=float,
        help="certify the fewest experts whose expected KL from the model's own predictions is at "
        "most this, nats per token",
    )  # fmt: skip
    parser.add_argument(
        "--strategies", nargs="+", default=[], metavar="ID", help="strategies to prepare"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn (0)")
    add_calibration(parser)
    parser.set_defaults(run=run_calibrate)


def run_calibrate(arguments: argparse.Namespace) -> None:
    """Calibrate, save, and say what was found.

    Raises:
        InputError: see :func:`moe_routing.evaluation.calibrate.calibrate`.
    """
    from moe_routing.routing.strategies import parse_strategy

    strategies = [parse_strategy(name) for name in arguments.strategies]
    texts = read_texts(arguments.text)
    if arguments.margin is not None and not 0 < arguments.margin < 10:
        raise InputError(f"--margin is {arguments.margin:g}; allowed: above 0 and below 10 nats")
    loaded = loaded_model(model_config(arguments))
    found = calibrated(loaded.model, loaded.tokenizer, texts, strategies, arguments)
    found.save(arguments.out)
    print(f"{found}\nsaved in {arguments.out}")


def calibrated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    strategies: Sequence[Strategy],
    arguments: argparse.Namespace,
) -> Calibration:
    """Return the calibration that the command line asks for."""
    from moe_routing.evaluation.calibrate import calibrate

    return calibrate(
        model,
        tokenizer,
        texts,
        strategies=strategies,
        margin=getattr(arguments, "margin", None),
        tokens=arguments.tokens,
        toggled_tokens=arguments.toggled_tokens,
        documents=arguments.documents,
        window=arguments.window,
        seed=arguments.seed,
    )
