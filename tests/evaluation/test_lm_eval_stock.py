"""Without a strategy, the plug-in scores a model as the harness does, whatever its weights."""

from __future__ import annotations

import numpy as np
import pytest

from moe_routing.lm_eval_plugin import RoutedLM


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_without_a_strategy_it_is_the_harness_s_own_model(
    make_model, tokenizer, ask, choice_requests, documents, family
):
    from lm_eval.models.huggingface import HFLM

    model = make_model(family, vocab_size=len(tokenizer), max_position_embeddings=256).double()
    model.set_experts_implementation("eager")  # in double precision, where ties are rare
    asked = ask("loglikelihood", [(one.context, one.continuation) for one in choice_requests])
    pages = ask("loglikelihood_rolling", [(document,) for document in documents])
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    expected_pages = theirs.loglikelihood_rolling(pages, disable_tqdm=True)
    ours = RoutedLM(pretrained=model, tokenizer=tokenizer)
    assert ours.get_model_info()["routing_strategy"] == "stock"
    found = ours.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], rtol=0, atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    found_pages = ours.loglikelihood_rolling(pages, disable_tqdm=True)
    np.testing.assert_allclose(found_pages, expected_pages, rtol=0, atol=1e-4)
