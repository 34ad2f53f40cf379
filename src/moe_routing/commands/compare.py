"""``moe-routing compare``: what strategies lose against the model as it is, and what they gain."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_routing.commands.options import (
    Subparsers,
    add_calibration,
    add_command,
    add_model,
    positive,
)
from moe_routing.errors import InputError
from moe_routing.vocabulary import DATASETS

EXAMPLES = """\
  moe-routing compare allenai/OLMoE-1B-7B-0924 --strategies stock_k4 regular_k6 --limit 200
  moe-routing compare ./my-model --strategies stock_k4 topp_k8_b4 certified_k8_m001 \\
      --tasks wikipedia hellaswag=my-items.jsonl --text notes.txt --out receipt
  moe-routing compare ./my-model --strategies stock_k4 --tasks gsm8k arc_easy --limit 100
  moe-routing compare --samples stock=a/samples_gsm8k_1.jsonl four=b/samples_gsm8k_2.jsonl

Tasks other than the four sets of this package are those of
lm-evaluation-harness. Files: WikiText's raw text; documents with blank lines between them or in a
column 'text' (wikipedia); HellaSwag's and LAMBADA's own layouts as .jsonl, .parquet or .arrow.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = add_command(
        subparsers, "compare", "what strategies lose and gain on your model and tasks", EXAMPLES
    )
    add_model(parser, optional=True)
    add = parser.add_argument
    add("--strategies", nargs="+", default=[], metavar="ID", help="such as stock_k4 bh_k8_a005")
    add("--baseline", default="stock", metavar="ID", help="what they are compared with (stock)")
    add("--tasks", nargs="+", default=["wikipedia", "hellaswag", "lambada"], metavar="TASK[=FILE]",
        help=f"{', '.join(DATASETS)}, from a local file if one is given, or tasks of "
        "lm-evaluation-harness (default: wikipedia hellaswag lambada)")  # fmt: skip
    add("--limit", type=positive, metavar="N", help="items of each task, drawn at random (all)")
    add("--text", type=Path, metavar="FILE", help="calibrate on these documents")
    add("--calibration", type=Path, metavar="DIR", help="use a saved calibration")
    add("--samples", nargs="+", metavar="[LABEL=]FILE",
        help="compare samples_*.jsonl of lm-evaluation-harness, the baseline's first")  # fmt: skip
    add("--include-path", metavar="DIR", help="more tasks for lm-evaluation-harness")
    add("--turns", type=int, default=3, metavar="N", help="how often speed is measured; 0: not (3)")
    add("--kl-items", type=int, default=24, metavar="N", help="items that KL is measured on (24)")
    add("--token-budget", type=positive, default=8192, metavar="N", help="tokens of a pass (8192)")
    add("--threads", type=positive, metavar="N", help="CPU threads (all)")
    add("--seed", type=int, default=0, help="seed of items and resamples (0)")
    add("--out", type=Path, metavar="DIR", help="write receipt.md, .html, .json and the cells")
    add_calibration(parser)
    parser.set_defaults(run=run_compare)


def run_compare(arguments: argparse.Namespace) -> None:
    """Compare, print the receipt, and write it if a folder is given.

    Raises:
        InputError: bad input, as far as possible before the model is loaded.
    """
    if (arguments.model is None) == (arguments.samples is None):
        raise InputError("compare: give either MODEL with --strategies, or --samples")
    if arguments.samples is not None:
        from moe_routing.commands.compare_samples import receipt_of_files

        receipt = receipt_of_files(arguments.samples, arguments.seed)
    else:
        from moe_routing.commands.compare_model import receipt_of_model

        receipt = receipt_of_model(arguments)
    print(receipt.markdown, end="")
    if arguments.out is not None:
        receipt.write(arguments.out)
