"""False discovery rate under the null needed, on documents that it was not fitted on.

    python benchmarks/false_discoveries.py                    # two minutes on one core
    python benchmarks/false_discoveries.py --results results/default --null needed_loss

Experts of calibration tokens of a finished study are toggled anew. The null is fitted on half of
the documents and judged on the other half: how many of the experts that the procedure keeps,
without floor and cap, are not needed. Rates and intervals (of resampled documents) are over all
layers, and means over splits; ``smallest`` and ``largest`` are the extremes of the splits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from measure import options, prepare, show

from moe_routing.analysis.held_out import held_out_fdr
from moe_routing.analysis.outputs import ALL_LAYERS
from moe_routing.config.study import load_config
from moe_routing.engine.loading import load_model
from moe_routing.evaluation.toggles import toggle_experts
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import fit_null
from moe_routing.routing.nulls.needed import Needed
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.procedures import bh_levels, by_levels
from moe_routing.routing.toggles import Toggles

ROOT = Path(__file__).resolve().parents[1]
PROCEDURES = {"BH": bh_levels, "BY": by_levels}


def toggled(arguments: argparse.Namespace, outputs: ExpertOutputs) -> Toggles:
    """Toggle experts of the calibration text of a study."""
    config = load_config(arguments.results / "config.yaml")
    loaded = load_model(config.model, arguments.threads or 1)
    texts = list(pd.read_parquet(arguments.results / "data" / "calibration.parquet")["text"])
    return toggle_experts(
        loaded.model,
        loaded.tokenizer,
        texts,
        outputs,
        tokens=arguments.tokens,
        rng=np.random.default_rng(arguments.seed),
    )


def splits(
    toggles: Toggles, calibration: Calibration, null_id: str, arguments: argparse.Namespace
) -> Iterator[pd.DataFrame]:
    """Yield the table of each split of the documents into halves, for both procedures."""
    rng = np.random.default_rng(arguments.seed)
    documents = toggles.document_P.unique().numpy()
    for _ in range(arguments.splits):
        rng.shuffle(documents)
        fit, test = np.array_split(documents, 2)
        fitted = toggles.of_documents(fit.tolist())
        outputs = calibration.outputs
        null = cast("Needed", fit_null(null_id, calibration.sample, fitted, outputs=outputs))
        for name, levels in PROCEDURES.items():
            table = held_out_fdr(
                null,
                toggles.of_documents(test.tolist()),
                arguments.alpha,
                outputs=outputs,
                levels=levels,
                confidence=0.95,
                resamples=500,
                rng=rng,
            )
            everything = table[table["layer"] == ALL_LAYERS]
            yield everything.assign(procedure=name, score=null.score)


def rates(arguments: argparse.Namespace) -> list[dict]:
    """Return one row per null, procedure and level."""
    calibration = Calibration.load(arguments.results / "calibration", [], outputs=True)
    toggles = toggled(arguments, cast("ExpertOutputs", calibration.outputs))
    rows = []
    for null_id in arguments.null:
        table = pd.concat(splits(toggles, calibration, null_id, arguments))
        for (procedure, alpha), part in table.groupby(["procedure", "alpha"]):
            rows.append(
                {
                    "null": null_id,
                    "score": ", ".join(part["score"].unique()),
                    "procedure": procedure,
                    "alpha": alpha,
                    "rate": part["fdr"].mean(),
                    "low": part["low"].mean(),
                    "high": part["high"].mean(),
                    "smallest": part["fdr"].min(),
                    "largest": part["fdr"].max(),
                    "experts kept": part["mean_rejected"].mean(),
                    "test tokens": part["n_tokens"].mean(),
                }
            )
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser, rounds=1)
    parser.set_defaults(threads=1)
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "results" / "default",
        help="folder of a finished study",
    )
    parser.add_argument("--tokens", type=int, default=600, help="tokens to intervene on")
    parser.add_argument("--splits", type=int, default=10, help="random halves of the documents")
    parser.add_argument("--null", nargs="+", default=["needed", "needed_e1e4", "needed_e1e3"])
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.01, 0.05, 0.1])
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Toggle, split, print."""
    arguments = parse(argv)
    record = {"arguments": vars(arguments), "machine": prepare(arguments)}
    record["false discoveries"] = rates(arguments)
    show(record, arguments.json)


if __name__ == "__main__":
    main()
