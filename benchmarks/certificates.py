"""Certified routing over random splits of documents: is the promise kept, and is it used?

    python benchmarks/certificates.py                    # a quarter of an hour on one core
    python benchmarks/certificates.py --results results/default --margin 0.01 0.02 --step 0.1

The documents are those that a finished study keeps apart to certify on, and those of its perplexity
set: both are drawn from one source if the study's config says so. Every rule is run once at every
budget of a grid. Then, for every split into halves, conformal risk control chooses the budget on
one half, and the damage (KL from stock, nats per token) is measured on the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from measure import options, prepare, show
from numpy.typing import NDArray

from moe_routing.analysis.text import text_dataset
from moe_routing.config.study import load_config
from moe_routing.data.items import read_items
from moe_routing.data.prepare import CERTIFICATION_FILE
from moe_routing.engine.loading import load_model
from moe_routing.evaluation.certify import CLIP
from moe_routing.evaluation.damage import Documents
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import Budgeted, Strategy, parse_strategy
from moe_routing.statistics.risk_control import risk

ROOT = Path(__file__).resolve().parents[1]
THRESHOLDS = ("", "_norm", "_consequence", "_compensated", "_consequence_compensated")
"""Parts of the ids of the rules with one threshold."""


def rules(top_k: int, budgets: Sequence[float]) -> Mapping[str, list[Strategy]]:
    """Return the settings of each rule, from few experts to many."""
    static = range(1, top_k + 1)
    settings = {
        "static": [f"stock_k{k}" for k in static],
        "static, compensated": [f"stock_k{k}_compensated" for k in static],
    }
    found = {name: [parse_strategy(one) for one in ids] for name, ids in settings.items()}
    for part in THRESHOLDS:
        base = parse_strategy(f"absolute_k{top_k}_b1{part}")
        grid = [base.model_copy(update={"budget": budget}) for budget in budgets]
        found[f"threshold{part}".replace("_", ", ", 1).replace("_", ", ")] = [
            *grid,
            parse_strategy("stock"),
        ]
    return found


def read_documents(results: Path) -> list[str]:
    """Return the documents of a study that nothing was fitted on."""
    config = load_config(results / "config.yaml")
    apart = pd.read_parquet(results / "data" / CERTIFICATION_FILE)["text"]
    items = read_items(results / "data" / f"{text_dataset(config.datasets)}.parquet")
    return [*apart, *(item.continuations[0] for item in items)]


def damages(
    documents: Documents, settings: Sequence[Strategy], calibration: Calibration
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the damage of each setting to each document, (settings, n), and its mean experts.

    A threshold keeps its budget on the calibration sample, as in a certificate.
    """
    experts = calibration.sample.num_experts
    given = [
        one.at(one.on_sample(calibration, experts)([one.budget]))
        if isinstance(one, Budgeted) and one.budget is not None
        else one
        for one in settings
    ]
    runs = [documents.damage(strategy, calibration) for strategy in given]
    return (
        np.stack([run.kl_n for run in runs]),
        np.array([run.statistics.mean_experts() for run in runs]),
    )


def chosen(loss_ln: NDArray[np.float64], margin: float) -> int:
    """Return the first setting whose risk is controlled, by a search through all of them."""
    clipped_ln = np.minimum(loss_ln, CLIP * margin)
    monotone_ln = np.maximum.accumulate(clipped_ln[::-1])[::-1]
    controlled = [risk(loss_n, CLIP * margin) <= margin for loss_n in monotone_ln]
    return controlled.index(True)


def over_splits(
    loss_ln: NDArray[np.float64], experts_l: NDArray[np.float64], margin: float, splits: int
) -> dict[str, float]:
    """Return means over random splits into halves."""
    rng = np.random.default_rng(0)
    documents = loss_ln.shape[1]
    rows = []
    for _ in range(splits):
        order = rng.permutation(documents)
        fit, test = np.array_split(order, 2)
        level = chosen(loss_ln[:, fit], margin)
        rows.append((experts_l[level], loss_ln[level, test].mean()))
    experts, held_out = np.array(rows).T
    return {
        "experts": experts.mean(),
        "held-out KL": held_out.mean(),
        "used": held_out.mean() / margin,
        "error of the mean KL": loss_ln[chosen(loss_ln, margin)].std() / np.sqrt(documents),
    }


def certificates(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield one row per rule and margin."""
    results = arguments.results
    config = load_config(results / "config.yaml")
    loaded = load_model(config.model, arguments.threads or 1)
    texts = read_documents(results)[: arguments.documents]
    documents = Documents(loaded.model, loaded.tokenizer, texts, window=config.evaluation.window)
    top_k = loaded.rule.top_k
    low, high = arguments.budgets or (arguments.step, top_k)
    budgets = np.arange(low, high, arguments.step).round(6).tolist()
    for name, settings in rules(top_k, budgets).items():
        if arguments.rule and name not in arguments.rule:
            continue
        calibration = Calibration.for_strategies(
            results / "calibration", *settings, fitted_by_running=False
        )
        loss_ln, experts_l = damages(documents, settings, calibration)
        for margin in arguments.margin:
            found = over_splits(loss_ln, experts_l, margin, arguments.splits)
            yield {"rule": name, "margin": margin, "documents": len(texts), **found}


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
    parser.add_argument("--documents", type=int, help="most documents")
    parser.add_argument("--margin", type=float, nargs="+", default=[0.01, 0.02, 0.05])
    parser.add_argument("--step", type=float, default=0.25, help="experts between budgets")
    parser.add_argument(
        "--budgets", type=float, nargs=2, help="fewest and most experts; all without this option"
    )
    parser.add_argument("--splits", type=int, default=200, help="random halves of the documents")
    parser.add_argument("--rule", nargs="*", help="names of rules; all without this option")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, split, print."""
    arguments = parse(argv)
    record = {"arguments": vars(arguments), "machine": prepare(arguments)}
    record["certificates"] = list(certificates(arguments))
    show(record, arguments.json)


if __name__ == "__main__":
    main()
