"""What the stock model is seen to do is what it does."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from moe_routing.analysis import capture as module
from moe_routing.analysis.baseline import prompt_logits
from moe_routing.analysis.capture import Capture, capture_texts, watch_ids
from moe_routing.data.items import Item
from moe_routing.engine.adapters import find_routers, watched
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.scorer import Scorer
from moe_routing.errors import InputError

WINDOW = 16


@pytest.fixture
def seen(tiny, tokenizer, texts):
    return capture_texts(tiny, tokenizer, texts, tokens=10**6, window=WINDOW, label="test")


def test_losses_are_those_of_the_scoring_engine(tiny, tokenizer, texts, seen):
    scores = Scorer(tiny, tokenizer, window=WINDOW, progress=False).score_rolling(texts)
    for document, score in enumerate(scores):
        own = seen.document_T == document
        assert int(own.sum()) == score.tokens
        assert float(seen.loss_T[own].double().sum()) == pytest.approx(
            -score.log_likelihood, rel=1e-4
        )


def test_every_token_of_a_long_document_is_predicted_once(tokenizer, texts, seen):
    for document, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        own = seen.document_T == document
        assert sorted(seen.next_T[own].tolist()) == sorted(ids)
        # Every token is read once too, the last one excepted; the prefix token stands before.
        assert sorted(seen.token_T[own].tolist()) == sorted([tokenizer.eos_token_id, *ids[:-1]])


def test_router_logits_are_the_router_applied_to_its_input(tiny, tokenizer):
    text = "The river rises in the hills."
    seen = capture_texts(tiny, tokenizer, [text], tokens=1, window=WINDOW, label="test")
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"][:-1]]])
    inputs = []
    routers = find_routers(tiny)
    handles = [
        router.module.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
        for router in routers
    ]
    with torch.no_grad():
        logits = tiny(ids).logits[0]
    for handle in handles:
        handle.remove()
    for router, hidden in zip(routers, inputs, strict=True):
        expected = F.linear(hidden.reshape(-1, 32), router.module.weight.detach())
        assert torch.allclose(seen.logits_LTE[router.layer], expected, atol=1e-5)
        assert torch.allclose(
            seen.input_norm_LT[router.layer], hidden.reshape(-1, 32).norm(dim=1), atol=1e-4
        )
    assert torch.equal(seen.predicted_T, logits.argmax(1))


def test_a_prompt_is_read_as_it_is_with_its_last_token_and_nothing_before(tiny, tokenizer):
    prompt = "The capital of France is"
    ids = tokenizer(prompt)["input_ids"]
    read, inputs = [], []
    handles = [
        tiny.get_input_embeddings().register_forward_hook(lambda _, x, __: read.append(x[0]))
    ]
    handles += [
        router.module.register_forward_hook(lambda _, x, __: inputs.append(x[0].reshape(-1, 32)))
        for router in find_routers(tiny)
    ]
    found = prompt_logits(LoadedModel(tiny, tokenizer, {}), [prompt], WINDOW)[prompt]
    for handle in handles:
        handle.remove()
    assert [given.tolist() for given in read] == [[ids]]
    assert tokenizer.eos_token_id not in ids
    for router, hidden_TH in zip(find_routers(tiny), inputs, strict=True):
        expected = F.linear(hidden_TH, router.module.weight.detach())
        assert expected.shape == (len(ids), 8)
        assert torch.allclose(torch.from_numpy(found[router.layer]), expected, atol=1e-5)
    _, norm_LS = watch_ids(tiny, torch.tensor(ids), "test")
    assert torch.allclose(norm_LS, torch.stack(inputs).norm(dim=-1), atol=1e-4)


@pytest.mark.parametrize(("prompt", "tokens"), [("", 0), ("a long one " * 20, 60)])
def test_a_prompt_that_does_not_fit_is_one_line(tiny, tokenizer, prompt, tokens):
    with pytest.raises(InputError, match=r"prompts has .* tokens; allowed: 1 to 16$") as caught:
        prompt_logits(LoadedModel(tiny, tokenizer, {}), [prompt], WINDOW)
    assert "\n" not in str(caught.value)
    assert (tokens == 0) == (", of 0 tokens" in str(caught.value))


def test_batching_and_padding_change_nothing(tiny, tokenizer, texts, seen, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    alone = capture_texts(tiny, tokenizer, texts, tokens=10**6, window=WINDOW, label="test")
    for document in range(len(texts)):
        a, b = seen.document_T == document, alone.document_T == document
        assert torch.equal(seen.next_T[a], alone.next_T[b])
        assert torch.allclose(seen.loss_T[a], alone.loss_T[b], atol=1e-4)
        assert torch.allclose(seen.logits_LTE[:, a], alone.logits_LTE[:, b], atol=1e-4)


def test_rotary_embeddings_do_not_follow_a_longer_window(make_model, tokenizer, texts):
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 12,
    }  # fmt: skip
    model = make_model(
        "Olmoe", vocab_size=len(tokenizer), max_position_embeddings=48, rope_parameters=rope
    )

    def capture(texts):
        return capture_texts(model, tokenizer, texts, tokens=10**6, window=48, label="test")

    short, long = " ".join(texts[0].split()[:6]), " ".join(texts) * 2
    alone, beside = capture([short]), capture([short, long])
    assert alone.tokens < 12 < beside.tokens
    own = beside.document_T == 0
    assert torch.allclose(beside.logits_LTE[:, own], alone.logits_LTE, atol=1e-4)
    assert torch.allclose(beside.loss_T[own], alone.loss_T, atol=1e-4)


def test_passes_of_other_threads_are_not_seen(tiny):
    ids = torch.arange(10)[None]
    seen = []
    with (
        watched(
            tiny, lambda layer, hidden, logits, _: seen.append((layer, hidden.shape, logits.shape))
        ),
        torch.no_grad(),
    ):
        thread = threading.Thread(target=tiny, args=(ids,))
        thread.start()
        thread.join()
        assert seen == []
        tiny(ids)
    assert seen == [(layer, (10, 32), (10, 8)) for layer in range(3)]


def test_whole_documents_up_to_the_tokens_asked_for(tiny, tokenizer, texts):
    first = len(tokenizer(texts[0])["input_ids"])
    seen = capture_texts(tiny, tokenizer, texts, tokens=first, window=WINDOW, label="test")
    assert seen.tokens == first
    more = capture_texts(tiny, tokenizer, texts, tokens=first + 1, window=WINDOW, label="test")
    assert more.document_T.unique().tolist() == [0, 1]


def test_the_model_is_left_as_it_was(tiny, seen):
    assert seen.tokens > 0
    for router in find_routers(tiny):
        assert "forward" not in vars(router.module)
        assert not router.module._forward_hooks


def test_a_capture_survives_its_file(tmp_path, seen):
    seen.save(tmp_path / "capture.safetensors")
    again = Capture.load(tmp_path / "capture.safetensors")
    assert all(torch.equal(getattr(seen, name), getattr(again, name)) for name in Capture.FIELDS)


def test_a_missing_or_wrong_file_is_one_line(tmp_path):
    for name, content in (("absent", None), ("broken", b"no safetensors")):
        path = tmp_path / name
        if content:
            path.write_bytes(content)
        with pytest.raises(InputError, match=r"no such file|not a capture") as caught:
            Capture.load(path)
        assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_are_an_error(tiny, tokenizer, texts):
    router = find_routers(tiny)[1].module
    before = router.weight[0, 0].item()
    with torch.no_grad():
        router.weight[0, 0] = float("nan")
    try:
        with pytest.raises(InputError, match="test: router logits of layer 1 are not finite"):
            capture_texts(tiny, tokenizer, texts, tokens=5, window=WINDOW, label="test")
        with pytest.raises(InputError, match="prompt: router logits of layer 1 are not finite"):
            watch_ids(tiny, torch.tensor([5, 6]), "prompt")
    finally:
        with torch.no_grad():
            router.weight[0, 0] = before


def test_the_text_of_an_item_has_its_right_continuation():
    item = Item("a", "a", "He said", (" no", " yes"), 1)
    assert item.text == "He said yes"
    assert Item("b", "b", "", ("A document.",), None).text == "A document."
