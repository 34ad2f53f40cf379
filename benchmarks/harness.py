"""Items per second: the engine against lm-evaluation-harness's HFLM, on the same model and items.

    snakemake --cores all                # once: makes the items of the default study
    python benchmarks/harness.py         # some minutes on two cores
    python benchmarks/harness.py --items 200 --results results/default --json harness.json

HellaSwag and LAMBADA items of a study are scored by ``HFLM.loglikelihood`` with stock
``grouped_mm`` experts, at the fastest of several batch sizes, and by the engine under
``regular_k8``; tokenising included. Both have the same threads: the harness gives all of them to
one batch after another, the engine divides them among concurrent batches. Accuracies must be
identical, or the script prints its tables and fails. Log-likelihoods agree up to rounding, except
where rounding decides between two experts whose logits are nearly equal. Needs
``pip install -e '.[harness]'``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from measure import interleave, options, prepare, ratio, show
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_routing.cli import run
from moe_routing.config.study import ModelConfig
from moe_routing.data.items import Item, read_items
from moe_routing.engine.loading import load_model
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError
from moe_routing.vocabulary import task_of

ROOT = Path(__file__).resolve().parents[1]
DATASETS = ("hellaswag", "lambada")

Answers = list[list[tuple[float, bool]]]
"""Log-likelihood and greedy flag of every continuation of every item."""


def by_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    batch_size: int,
) -> Answers:
    """Score as the harness does."""
    model.set_experts_implementation("grouped_mm")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    texts = [(item.context, text) for item in items for text in item.continuations]
    instances = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(texts)]
    answers = iter(lm.loglikelihood(instances, disable_tqdm=True))
    return [[next(answers) for _ in item.continuations] for item in items]


def by_engine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], task: str
) -> Answers:
    """Score as a study does."""
    with routed(model, "regular_k8"):
        groups = Scorer(model, tokenizer, progress=False).score_items(items, task)
    return [[(score.log_likelihood, score.greedy) for score in group] for group in groups]


def accuracies(items: Sequence[Item], answers: Answers, task: str) -> dict[str, float]:
    """Return accuracies by the harness's definitions."""
    if task == "last_word":
        return {"acc": float(np.mean([group[0][1] for group in answers]))}
    right, normalised = [], []
    for item, group in zip(items, answers, strict=True):
        likelihood = np.array([value for value, _ in group])
        lengths = np.array([len(choice) for choice in item.choices])
        right.append(likelihood.argmax() == item.label)
        normalised.append((likelihood / lengths).argmax() == item.label)
    return {"acc": float(np.mean(right)), "acc_norm": float(np.mean(normalised))}


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    dataset: str,
    arguments: argparse.Namespace,
) -> list[dict]:
    """Find the harness's best batch size on a quarter of the items, then time both on all."""
    task = task_of(dataset).name
    quarter = items[: max(1, len(items) // 4)]
    sizes = {
        size: partial(by_harness, model, tokenizer, quarter, size) for size in arguments.batch_sizes
    }
    seconds = interleave(sizes, 1, arguments.device)
    best = min(seconds, key=lambda size: seconds[size][0])
    answers: dict[str, Answers] = {}

    def keep(name: str, score: Callable[[], Answers]) -> None:
        answers[name] = score()

    theirs, ours = f"HFLM, batches of {best}", "engine"
    runs = {
        theirs: partial(keep, theirs, partial(by_harness, model, tokenizer, items, best)),
        ours: partial(keep, ours, partial(by_engine, model, tokenizer, items, task)),
    }
    times = interleave(runs, arguments.rounds, arguments.device)
    values = {
        name: np.array([value for group in answers[name] for value, _ in group]) for name in runs
    }
    differences = {name: np.abs(values[name] - values[theirs]) for name in runs}
    return [
        {
            "set": dataset,
            "implementation": name,
            "items": len(items),
            "items/s": len(items) / statistics.median(times[name]),
            "times HFLM": ratio(times[theirs], times[name]),
            **{
                metric: accuracies(items, answers[name], task).get(metric)
                for metric in ("acc", "acc_norm")
            },
            "largest difference, nats": float(differences[name].max()),
            "differences above 1e-4": int((differences[name] > 1e-4).sum()),
        }
        for name in runs
    ]


def check(rows: Sequence[dict]) -> None:
    """Raise InputError unless both have the same accuracies."""
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        for metric in ("acc", "acc_norm"):
            if theirs[metric] != ours[metric]:
                raise InputError(
                    f"{ours['set']}: {metric} is {ours[metric]} by the engine; it must be the "
                    f"harness's {theirs[metric]}"
                )


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Return about ``count`` items, evenly spaced: sets are ordered by source and so by length."""
    return list(items[:: max(1, len(items) // count)][:count])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser, rounds=5)
    parser.add_argument("--model", default=str(ROOT / "resources" / "olmoe-nano"))
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "results" / "default",
        help="folder of a study, with data/hellaswag.parquet and data/lambada.parquet",
    )
    parser.add_argument("--items", type=int, default=100, help="of each set")
    parser.add_argument(
        "--batch-sizes",
        type=lambda text: [int(size) for size in text.split(",")],
        default="4,16,64",
        help="comma-separated; the harness gets the fastest",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, time, print, check."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    sets = {
        name: evenly_spaced(
            read_items(arguments.results / "data" / f"{name}.parquet"), arguments.items
        )
        for name in DATASETS
    }
    record = {"arguments": vars(arguments), "machine": prepare(arguments)}
    config = ModelConfig(path=arguments.model, device=arguments.device)
    loaded = load_model(config, arguments.threads)
    record["items"] = [
        row
        for name, items in sets.items()
        for row in compare(loaded.model, loaded.tokenizer, items, name, arguments)
    ]
    show(record, arguments.json)
    check(record["items"])


if __name__ == "__main__":
    run(lambda _: main())
