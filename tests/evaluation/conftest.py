"""The embedded model in double precision, where rounding does not change a routing decision.

Top-k is discontinuous: in single precision two right computations now and then route a token
differently where two experts are nearly tied, and the likelihoods of its request differ visibly.
Stock experts implementations differ from each other in the same way. In double precision they
agree, and so must the engine.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def double(nano):
    """Return the embedded model in float64, with stock experts."""
    model = copy.deepcopy(nano.model).to(torch.float64)
    model.set_experts_implementation("eager")
    return model


@pytest.fixture(scope="session")
def rows():
    """Return a reader of the rows of a data set's excerpt."""
    folder = Path(__file__).parents[1] / "data_files"

    def read(name):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return read


@pytest.fixture(scope="session")
def choice_requests(rows):
    """Return the requests of 6 HellaSwag items, four a context."""
    from moe_routing.engine.requests import Request

    return [
        Request(f"{row['activity_label']}: {row['ctx']}", f" {ending}")
        for row in rows("hellaswag")[:6]
        for ending in row["endings"]
    ]


@pytest.fixture(scope="session")
def word_requests(rows):
    """Return the requests of 6 LAMBADA items."""
    from moe_routing.engine.requests import Request

    texts = [row["text"] for row in rows("lambada")[:6]]
    return [Request(*split) for split in ((t[: t.rindex(" ")], t[t.rindex(" ") :]) for t in texts)]


@pytest.fixture(scope="session")
def documents(rows):
    """Return texts shorter and longer than the window of 256 tokens."""
    passages = [row["passage"] for row in rows("wikipedia")]
    return [passages[0], " ".join(passages[1:5]), "One.", " ".join(passages[5:12])]


@pytest.fixture
def harness(double, tokenizer):
    """Return lm-evaluation-harness's own model around the double-precision one."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=double, tokenizer=tokenizer, batch_size=8)


@pytest.fixture(scope="session")
def ask():
    """Return a maker of the harness's requests."""
    from lm_eval.api.instance import Instance

    def make(kind, arguments):
        return [Instance(kind, {}, args, place) for place, args in enumerate(arguments)]

    return make


@pytest.fixture
def threads(request):
    """Give torch as many threads as the test's module says in ``THREADS``."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.module.THREADS)
    yield request.module.THREADS
    torch.set_num_threads(before)
