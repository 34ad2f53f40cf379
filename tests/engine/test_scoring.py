"""The engine against itself: budgets, order, sharing, memory, telemetry."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from moe_routing.engine import scorer
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.requests import Request, TokenRequest
from moe_routing.engine.routed import routed, routes_in_order
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError

THREADS = 2


def likelihoods(scores):
    return np.array([score.log_likelihood for score in scores])


@pytest.fixture(scope="module")
def mixed(choice_requests, word_requests):
    return [*choice_requests[:12], *word_requests[:3], Request("", "No context.")]


@pytest.fixture(scope="module")
def expected(double, nano, mixed):
    """Scores of the slowest way: alone, one after the other."""
    scorer = Scorer(double, nano.tokenizer)
    return [scorer.score([request])[0] for request in mixed]


@pytest.mark.parametrize("budget", [128, 700, 100_000])
@pytest.mark.parametrize("proportion", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_budget_sharing_and_layout_do_not_matter(
    double, tokenizer, mixed, expected, budget, proportion, padded
):
    scorer = Scorer(
        double, tokenizer, token_budget=budget, share_prefixes=proportion, padded_attention=padded
    )
    scores = scorer.score(mixed)
    np.testing.assert_allclose(likelihoods(scores), likelihoods(expected), rtol=0, atol=1e-9)
    assert [(s.greedy, s.tokens) for s in scores] == [(s.greedy, s.tokens) for s in expected]


def test_order_does_not_matter(double, tokenizer, mixed, expected):
    order = np.random.default_rng(0).permutation(len(mixed))
    scores = Scorer(double, tokenizer).score([mixed[index] for index in order])
    shuffled = likelihoods(expected)[order]
    np.testing.assert_allclose(likelihoods(scores), shuffled, rtol=0, atol=1e-9)


def test_single_precision_is_double_precision_to_rounding(model, tokenizer, mixed, expected):
    """All but the few requests in which rounding decides between two nearly tied experts."""
    scores = Scorer(model, tokenizer).score(mixed)
    difference = np.abs(likelihoods(scores) - likelihoods(expected))
    assert np.quantile(difference, 0.8) < 1e-4
    assert difference.max() < 0.05


def test_results_repeat_to_the_bit(model, tokenizer, mixed):
    first = Scorer(model, tokenizer).score(mixed)
    assert first == Scorer(model, tokenizer).score(mixed)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_matter(double, tokenizer, calibration, mixed, expected, threads, workers):
    scorer = Scorer(double, tokenizer, workers=workers, token_budget=150)
    scores = scorer.score(mixed)
    np.testing.assert_allclose(likelihoods(scores), likelihoods(expected), rtol=0, atol=1e-9)
    assert [(s.greedy, s.tokens) for s in scores] == [(s.greedy, s.tokens) for s in expected]
    statistics = []
    for count in (1, workers, workers):
        recorder = Recorder()
        bh = "bh_k16_a005_within-token"  # of the routers alone: the model was toggled in float32
        with routed(double, bh, calibration=calibration, recorder=recorder):
            scorer = Scorer(double, tokenizer, workers=count, token_budget=150, recorder=recorder)
            scores = scorer.score(mixed)
        statistics.append((recorder.statistics(), [score.mean_experts for score in scores]))
    (alone, counts), (first, first_counts), (again, _) = statistics
    assert np.array_equal(first.load_LE, alone.load_LE)
    assert np.array_equal(first.count_histogram_LC, alone.count_histogram_LC)
    assert first_counts == counts
    np.testing.assert_allclose(first.entropy_L, alone.entropy_L, rtol=1e-12)
    # Sums come in the order of the batches, whichever was done first.
    assert first.forwards == again.forwards > 2
    assert np.array_equal(first.entropy_L, again.entropy_L)


def test_many_tokens_are_scored_by_several_workers(model, tokenizer, mixed, threads, monkeypatch):
    monkeypatch.setattr(scorer, "MIN_WORKER_TOKENS", 100)
    names = set()

    def note(*_):
        names.add(threading.current_thread().name)

    with model.model.norm.register_forward_pre_hook(note):
        scoring = Scorer(model, tokenizer)
        scoring.score(mixed[:1])  # compares the engine with the model's own pass
        names.clear()
        scores = scoring.score(mixed)
        assert len(names) == 2
        assert scores == Scorer(model, tokenizer).score(mixed)
        names.clear()
        Scorer(model, tokenizer).score(mixed[-1:])
        assert names == {threading.main_thread().name}


def test_draws_by_forward_pass_stay_in_order(
    model, tokenizer, calibration, mixed, threads, monkeypatch
):
    monkeypatch.setattr(scorer, "MIN_WORKER_TOKENS", 100)

    def scores(**options):
        with routed(model, "randomid.adaptive_k8", calibration=calibration):
            return Scorer(model, tokenizer, token_budget=150, **options).score(mixed)

    assert scores() == scores(workers=1)
    with routed(model, "adaptive_k8", calibration=calibration):
        assert not routes_in_order(model)


def test_no_worker_is_refused(model, tokenizer):
    with pytest.raises(InputError, match="workers is 0; allowed: at least 1"):
        Scorer(model, tokenizer, workers=0)


def test_documents_do_not_depend_on_each_other(double, tokenizer, documents):
    scorer = Scorer(double, tokenizer, window=64, token_budget=300)
    together = scorer.score_rolling(documents)
    alone = [scorer.score_rolling([text])[0] for text in documents]
    np.testing.assert_allclose(likelihoods(together), likelihoods(alone), rtol=0, atol=1e-9)
    tokens = [len(tokenizer(text, verbose=False)["input_ids"]) for text in documents]
    assert [score.tokens for score in together] == tokens
    assert all(score.greedy is None for score in together)


def test_mean_experts_of_a_static_strategy(model, tokenizer, choice_requests, documents):
    recorder = Recorder()
    scorer = Scorer(model, tokenizer, recorder=recorder)
    with routed(model, "regular_k3", recorder=recorder):
        scores = scorer.score(choice_requests) + scorer.score_rolling(documents)
    assert {score.mean_experts for score in scores} == {3.0}


@pytest.mark.parametrize("proportion", [True, False])
def test_mean_experts_are_those_of_the_tokens_read(
    double, tokenizer, choice_requests, calibration, proportion
):
    recorder = Recorder()
    scorer = Scorer(double, tokenizer, recorder=recorder, share_prefixes=proportion)
    scores, alone = [], []
    with routed(double, "adaptive_k8", calibration=calibration, recorder=recorder):
        scores = scorer.score(choice_requests[:8])
    for request in choice_requests[:8]:
        single = Recorder()
        with routed(double, "adaptive_k8", calibration=calibration, recorder=single):
            Scorer(double, tokenizer).score([request])
        alone.append(single.statistics().mean_experts())
    np.testing.assert_allclose([score.mean_experts for score in scores], alone, atol=1e-9)
    assert len(set(alone)) > 1


def test_a_shared_context_is_computed_and_counted_once(model, tokenizer, choice_requests):
    def tokens(proportion):
        recorder = Recorder()
        with routed(model, "regular_k1", recorder=recorder):
            scorer = Scorer(model, tokenizer, recorder=recorder, share_prefixes=proportion)
            encoded = scorer.encoder.requests(choice_requests[:4])
            scorer.score(choice_requests[:4])
        return recorder.statistics().tokens, [len(request.input_ids) for request in encoded]

    shared, sizes = tokens(proportion=True)
    apart, _ = tokens(proportion=False)
    assert apart == sum(sizes)
    assert shared < apart - 2 * min(sizes) / 2


ON_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
ON_A_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.fixture
def scarce(double):
    """Return a setter of how many tokens fit; memory runs out after the last layer."""
    handles = []

    def set_limit(limit, error=ON_A_GPU):
        def check(_, inputs):
            if inputs[0].shape[1] > limit:
                raise error

        handles.append(double.model.norm.register_forward_pre_hook(check))

    yield set_limit
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("error", [ON_A_GPU, ON_A_CPU])
def test_memory_runs_out_and_the_budget_is_halved(
    double, tokenizer, mixed, expected, scarce, capsys, error
):
    with routed(double, "regular_k8", recorder=(plain := Recorder())):
        Scorer(double, tokenizer, recorder=plain).score(mixed)
    scarce(400, error)
    recorder = Recorder()
    with routed(double, "regular_k8", recorder=recorder):
        scorer = Scorer(double, tokenizer, token_budget=1200, recorder=recorder)
        scores = scorer.score(mixed)
    np.testing.assert_allclose(likelihoods(scores), likelihoods(expected), rtol=0, atol=1e-9)
    assert scorer.token_budget in (150, 300)
    assert f"evaluation.token_budget is now {scorer.token_budget}" in capsys.readouterr().err
    # What was computed in vain is not counted.
    assert recorder.statistics().tokens == plain.statistics().tokens
    assert np.array_equal(recorder.statistics().load_LE, plain.statistics().load_LE)


def test_memory_runs_out_with_several_workers(double, tokenizer, mixed, expected, scarce, capsys):
    scarce(150)
    recorder = Recorder()
    with routed(double, "regular_k8", recorder=recorder):
        scorer = Scorer(double, tokenizer, token_budget=1200, recorder=recorder, workers=2)
        scores = scorer.score(mixed)
    np.testing.assert_allclose(likelihoods(scores), likelihoods(expected), rtol=0, atol=1e-9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "out of memory: one forward pass at a time from here on"
    assert lines[-1] == f"out of memory: evaluation.token_budget is now {scorer.token_budget}"
    with routed(double, "regular_k8", recorder=(plain := Recorder())):
        Scorer(double, tokenizer, token_budget=150, recorder=plain).score(mixed)
    assert np.array_equal(recorder.statistics().load_LE, plain.statistics().load_LE)


def test_memory_too_small_for_one_request_is_one_line(double, tokenizer, mixed, scarce):
    scarce(limit=0)  # nor is there enough to compare the engine with the model's own pass
    with pytest.raises(InputError, match="out of memory on cpu with a single request"):
        Scorer(double, tokenizer).score(mixed)


def test_other_errors_are_not_taken_for_it(double, tokenizer, mixed, scarce):
    scarce(400, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Scorer(double, tokenizer).score(mixed)


@pytest.fixture
def overflowing(make_model, tokenizer):
    """Return a model whose half precision overflows behind its last router."""
    model = make_model("Olmoe", vocab_size=len(tokenizer))
    model.model.layers[-1].mlp.experts.down_proj.mul_(1e5)
    return model.half()


@pytest.mark.parametrize("recorded", [False, True])
def test_a_likelihood_that_is_not_a_number_names_its_request(
    overflowing, tokenizer, recorded, threads
):
    recorder = Recorder() if recorded else None
    requests = [Request("The river flows", " through the city"), Request("One", " two")]
    state = [dict(vars(module)) for module in overflowing.modules()]
    with routed(overflowing, "regular_k8", recorder=recorder):
        scorer = Scorer(overflowing, tokenizer, recorder=recorder)
        with pytest.raises(
            InputError,
            match=r"cell x: the log-likelihood of request 1 \(continuation ' through the city'\) "
            r"is nan; allowed: finite",
        ):
            scorer.score(requests, label="cell x")
        with pytest.raises(InputError, match="score: the log-likelihood of request 1"):
            scorer.score_rolling(["The river flows."])
    assert [dict(vars(module)) for module in overflowing.modules()] == state


def test_router_logits_that_are_not_numbers_are_the_reason_given(
    overflowing, tokenizer, monkeypatch
):
    """As on an accelerator, where the router itself does not look."""
    from moe_routing.engine import recorder as module

    monkeypatch.setattr(module, "entropy", lambda rows: rows.sum(1) * torch.nan)
    recorder = Recorder()
    with routed(overflowing, "regular_k8", recorder=recorder):
        scorer = Scorer(overflowing, tokenizer, recorder=recorder)
        with pytest.raises(InputError, match="score: router logits of layer 0 are not finite"):
            scorer.score([Request("One", " two")])


def test_an_interrupted_call_leaves_no_trace(model, tokenizer, mixed, threads, monkeypatch):
    state = [dict(vars(module)) for module in model.modules()]
    attention = model.config._attn_implementation

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scorer.tqdm, "update", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        Scorer(model, tokenizer, workers=2, token_budget=150).score(mixed)
    # While the error, and with it every frame, is still held.
    assert caught.value is not None
    assert [dict(vars(module)) for module in model.modules()] == state
    assert model.config._attn_implementation == attention
    assert not [t for t in threading.enumerate() if t.name.startswith("batch")]


@pytest.mark.parametrize("length", [5, 40])
def test_a_model_is_scored_by_one_call_at_a_time(make_model, tokenizer, length):
    model = make_model("Mixtral", sliding_window=20)  # the long request takes a plain pass
    request = [TokenRequest(list(range(3, 3 + length)), [4])]
    first, second = Scorer(model, tokenizer), Scorer(model, tokenizer)
    for one in (first, second):  # each compares the engine with the model's own pass once
        one.score_tokens(request, [[0]])
    found = []

    def ask(*_):
        try:
            second.score_tokens(request, [[0]])
        except InputError as error:
            found.append(str(error))

    with model.model.norm.register_forward_pre_hook(ask):
        first.score_tokens([TokenRequest([5, 6, 7], [8])], [[0]])
    assert found == [
        "the model is being scored already, or one with the same config object; allowed: one call "
        "after the other, or models of their own"
    ]
    assert second.score_tokens(request, [[0]])[0].tokens == 1


def test_other_models_are_scored_at_the_same_time(make_model, tokenizer):
    requests = [TokenRequest(list(range(3, 40)), [40]), TokenRequest([5, 9, 11], [3])]
    models = [make_model("Olmoe"), make_model("Olmoe")]
    scorers = {model: Scorer(model, tokenizer, workers=1) for model in models}
    alone = [scorer.score_tokens(requests, [[0], [1]]) for scorer in scorers.values()]
    together = threading.Barrier(2)
    state = [dict(vars(module)) for model in models for module in model.modules()]

    def ask(model):
        waited = []

        def wait(*_):
            if not waited:
                waited.append(together.wait(30))

        with model.model.norm.register_forward_pre_hook(wait):
            return scorers[model].score_tokens(requests, [[0], [1]])

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, models)) == alone
    assert [dict(vars(m)) for model in models for m in model.modules()] == state


def test_progress_is_silent_off_a_terminal_unless_asked_for(model, tokenizer, capsys):
    requests = [Request("The cat sat on the", " mat.")]
    Scorer(model, tokenizer).score(requests)
    assert capsys.readouterr().err == ""
    Scorer(model, tokenizer, progress=True).score(requests, label="cell x")
    assert "cell x" in capsys.readouterr().err


def test_nothing_to_score(model, tokenizer):
    assert Scorer(model, tokenizer).score([]) == []
    assert Scorer(model, tokenizer).score_rolling([]) == []


def test_items(double, tokenizer, mixed, expected, documents):
    from moe_routing.data.items import Item, document_item

    item = Item("a-0", "a", mixed[0].context, tuple(r.continuation for r in mixed[:4]), label=1)
    scorer = Scorer(double, tokenizer)
    scores = scorer.score_items([item], "multiple_choice")
    np.testing.assert_allclose(likelihoods(scores[0]), likelihoods(expected[:4]), atol=1e-9)
    pages = [document_item("wikipedia", row, text, text) for row, text in enumerate(documents)]
    scores = scorer.score_items(pages, "perplexity")
    assert [len(group) for group in scores] == [1] * len(documents)
    whole = likelihoods(scorer.score_rolling(documents))
    np.testing.assert_allclose([group[0].log_likelihood for group in scores], whole, atol=1e-9)
