"""The engine against lm-evaluation-harness: the same model, the same items, the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from moe_routing.data.tasks import load_items
from moe_routing.engine.requests import Request
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.evaluation.cells import _rows
from moe_routing.statistics.intervals import metric_intervals
from moe_routing.vocabulary import DATASETS

# Even a stock model in double precision computes its norms in single precision; ours does not.
NATS = 2e-5
RELATIVE = 1e-6

# Our metric: the harness's name of it.
METRICS = {
    "hellaswag": {"accuracy": "acc", "accuracy_norm": "acc_norm"},
    "lambada": {"accuracy": "acc", "last_word_perplexity": "perplexity"},
    "wikitext": {
        "word_perplexity": "word_perplexity",
        "byte_perplexity": "byte_perplexity",
        "bits_per_byte": "bits_per_byte",
    },
}
CONFIGS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}


@pytest.fixture
def local_task(rows, documents, tmp_path):
    """Return a maker of a file of a few items and the harness's own task over it."""

    def make(name):
        few = [{"page": page} for page in documents] if name == "wikitext" else rows(name)[:8]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in few), encoding="utf-8")
        values = load_yaml(Path(lm_eval.__file__).parent / "tasks" / CONFIGS[name])
        values |= dict.fromkeys(("training_split", "validation_split"))
        values |= {
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path)},
        }
        return path, ConfigurableTask(config=values)

    return make


def by_harness(model, name, task):
    results = lm_eval.evaluate(model, {name: task}, bootstrap_iters=0, log_samples=False)
    return {key.split(",")[0]: value for key, value in results["results"][name].items()}


def most_likely(model, tokenizer, context):
    ids = tokenizer(context, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        best = model(ids).logits[0, -1].argmax()
    return Request(context, tokenizer.decode(best))


def test_requests_get_the_same_likelihood_and_greedy_flag(
    double, tokenizer, harness, ask, choice_requests, word_requests
):
    requests = [*choice_requests, *word_requests, most_likely(double, tokenizer, "The end of")]
    arguments = [(request.context, request.continuation) for request in requests]
    theirs = harness.loglikelihood(ask("loglikelihood", arguments), disable_tqdm=True)
    scores = Scorer(double, tokenizer).score(requests)
    likelihoods = [score.log_likelihood for score in scores]
    np.testing.assert_allclose(likelihoods, [value for value, _ in theirs], rtol=0, atol=NATS)
    assert [score.greedy for score in scores] == [greedy for _, greedy in theirs]
    assert scores[-1].greedy


@pytest.mark.parametrize("window", [None, 50])
def test_documents_get_the_same_likelihood(double, tokenizer, harness, ask, documents, window):
    harness._max_length = window
    theirs = harness.loglikelihood_rolling(ask("loglikelihood_rolling", [(d,) for d in documents]))
    scores = Scorer(double, tokenizer, window=window).score_rolling(documents)
    likelihoods = [score.log_likelihood for score in scores]
    np.testing.assert_allclose(likelihoods, theirs, rtol=0, atol=NATS)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_the_harness_s(double, tokenizer, harness, local_task, name):
    path, task = local_task(name)
    theirs = by_harness(harness, name, task)
    items = load_items(name, path)
    with routed(double, "regular_k8"):
        scores = Scorer(double, tokenizer).score_items(items, DATASETS[name].task)
    # _rows wants mean experts, which take a recorder; they are not compared here.
    frame = pd.DataFrame(
        _rows(items, [[_with_experts(s) for s in g] for g in scores], DATASETS[name].task)
    )
    rng = np.random.default_rng(0)
    estimates = metric_intervals(frame, DATASETS[name].task, confidence=0.9, resamples=100, rng=rng)
    ours = {estimate.metric: estimate.value for estimate in estimates}
    for our_name, their_name in METRICS[name].items():
        assert ours[our_name] == pytest.approx(theirs[their_name], rel=RELATIVE), our_name


@pytest.mark.parametrize("name", METRICS)
def test_the_plug_in_runs_the_harness_s_tasks(double, tokenizer, harness, local_task, name):
    from moe_routing.lm_eval_plugin import RoutedLM

    _, task = local_task(name)
    theirs = by_harness(harness, name, task)
    plug_in = RoutedLM(pretrained=double, tokenizer=tokenizer, strategy="regular_k8")
    ours = by_harness(plug_in, name, task)
    for metric in METRICS[name].values():
        assert ours[metric] == pytest.approx(theirs[metric], rel=RELATIVE), metric


def _with_experts(score):
    return type(score)(score.log_likelihood, score.greedy, score.tokens, 8.0)
