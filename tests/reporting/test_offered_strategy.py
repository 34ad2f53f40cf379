"""A strategy of another package goes all the way: from a config to figure, table and sentence."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from offered_strategies import EVERY_OTHER, forget, write_package
from planted_results import make_study, planted_config

from moe_routing import routed
from moe_routing.config.cells import Cell, cells_of
from moe_routing.engine.recorder import Recorder
from moe_routing.reporting import tables
from moe_routing.reporting.article import Article
from moe_routing.reporting.comparison_report import comparison_report
from moe_routing.reporting.plots import draw
from moe_routing.routing.types import RouterInputs

STRATEGIES = ("stock", "regular_k2", "regular_k4", "everyother_k4", "everyother_k8")


@pytest.fixture(scope="module", autouse=True)
def _offered(tmp_path_factory):
    """The package is installed: its folder is on the path, with its entry point."""
    folder = write_package(
        tmp_path_factory.mktemp("offered"), EVERY_OTHER, everyother="toy_routing:EveryOther"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        forget()
        yield
    forget()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A planted study in which every other expert costs quality on every set."""
    config = planted_config(
        strategies=STRATEGIES, datasets=("hellaswag", "lambada"),
        primary=("everyother_k8", "hellaswag"),
    )  # fmt: skip
    effects = {"everyother_k8": -0.08, "everyother_k4": -0.08}
    return make_study(tmp_path_factory.mktemp("toy"), config, effects, items=400)


def test_the_config_has_it_parsed(study):
    strategy = study.config.parsed["everyother_k8"]
    assert (strategy.id, strategy.max_experts) == ("everyother_k8", 4)
    assert Cell("cells", "everyother_k8", "lambada") in cells_of(study.config)


def test_it_chooses_what_a_slow_loop_chooses(study):
    logits_TE = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    select = study.config.parsed["everyother_k8"].selector(None, 16)
    chosen = select(RouterInputs(0, logits_TE), logits_TE.softmax(-1)).index_TK
    for row, logits in zip(chosen.tolist(), logits_TE.tolist(), strict=True):
        order = sorted(range(16), key=lambda expert: -logits[expert])
        assert row == [order[0], order[2], order[4], order[6]]


def test_it_routes_a_model(nano):
    recorder = Recorder()
    ids = torch.tensor([[5, 17, 300, 41, 8, 99]])
    with torch.no_grad():
        stock = nano.model(ids).logits
        with routed(nano.model, "everyother_k8", recorder=recorder):
            other = nano.model(ids).logits
        assert torch.equal(nano.model(ids).logits, stock)
    assert recorder.statistics().mean_experts() == 4
    assert not torch.allclose(other, stock)


def test_it_has_a_line_of_its_own_in_figures(study):
    figure = draw(study)["pareto"]()
    lines = [
        container.lines[0] for axis in figure.axes for container in axis.containers
        if container.get_label() == "Every other"
    ]  # fmt: skip
    assert len(lines) == 2  # data sets
    assert {(line.get_color(), line.get_marker()) for line in lines} == {("#7A5CFF", "$E$")}
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert "Every other" in texts
    plt.close("all")


def test_it_has_rows_in_tables(study):
    row = tables.strategy_table(study).set_index("Family").loc["Every other"]
    assert row["Selection"] == "every other one of the k largest logits"
    assert row["Settings"] == "`everyother_k4`, `everyother_k8`"
    results = tables.results_table(study).set_index("Strategy")
    assert results.loc["`everyother_k8`", "What it is"] == (
        "every other of the top 8, softmax weights"
    )


def test_sentences_speak_of_it(study):
    article = Article(study)
    assert "every other expert" in article.families
    said = str(article.say("matched_summary"))
    assert "Every other was worse than static top-k with softmax weights and the same mean" in said
    report = comparison_report(study)
    assert "On HellaSwag, every other expert was less accurate than" in report
