"""Families of strategies are found, and each carries all that the later stages need."""

from __future__ import annotations

from pathlib import Path

import pytest
from offered_strategies import EVERY_OTHER, forget, write_package

from moe_routing.config.study import load_config
from moe_routing.errors import InputError
from moe_routing.routing.strategies import (
    ControlStrategy,
    Strategy,
    control_kinds,
    controls,
    families,
    family_entry,
    parse_strategy,
    static_families,
)
from moe_routing.vocabulary import WEIGHTINGS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Install a package whose module has this source and these entry points."""

    def install(source: str, **points: str) -> None:
        monkeypatch.syspath_prepend(write_package(tmp_path, source, **points))
        forget()

    yield install
    monkeypatch.undo()
    forget()


def subclasses(cls):
    return {cls}.union(*map(subclasses, cls.__subclasses__()))


def test_every_strategy_of_the_package_is_found():
    """By another way than discovery goes: all subclasses in these modules that have a selector."""
    package = "moe_routing.routing.strategies."
    found = {*families().values(), *controls().values()}
    concrete = {
        cls
        for cls in subclasses(Strategy)
        if cls.__module__.startswith(package) and not cls.__abstractmethods__
    }
    assert found == concrete
    assert len(found) == 25
    assert all(issubclass(cls, ControlStrategy) for cls in controls().values())


def test_static_curves_come_first_and_the_kinds_in_the_order_of_the_texts():
    assert list(families())[:5] == ["regular", "normalized", "uniform", "stock", "absolute"]
    curves = {weighting: entry.name for weighting, entry in static_families().items()}
    assert curves == {
        "softmax": "regular", "renormalised": "normalized", "uniform": "uniform", "model": "stock",
    }  # fmt: skip
    assert set(curves) < set(WEIGHTINGS)
    assert list(control_kinds()) == [
        "static", "shuffle", "counts", "layermean", "mixture", "randomid", "weighting", "rival",
    ]  # fmt: skip


def test_a_control_may_share_the_entry_of_a_rule():
    rule, control = families()["mixture"].family, controls()["mixture"].family
    assert rule.control is None
    assert control.control is not None
    assert (rule.label, rule.look) == (control.label, control.look)


@pytest.mark.parametrize("kind", [kind for kind in control_kinds().values() if kind.done])
def test_every_kind_of_control_has_all_its_sentences(kind):
    assert set(kind.meanings) == {"worse", "better", "none"}
    assert set(kind.raw_meanings) <= set(kind.meanings)
    assert kind.done.format(base="BASE", control="CONTROL") != kind.done
    assert kind.short
    assert kind.absent


def test_an_offered_strategy_is_a_family_like_the_others(offer):
    offer(EVERY_OTHER, every_other="toy_routing:EveryOther")
    assert list(families())[-1] == "everyother"
    assert family_entry("everyother").label == "Every other"
    assert parse_strategy("everyother_k8").max_experts == 4
    with pytest.raises(InputError, match=r"^strategy 'everyother_k0': k is 0; input should be gre"):
        parse_strategy("everyother_k0")
    with pytest.raises(InputError, match="did you mean 'everyother'"):
        parse_strategy("everyothr_k8")


def test_what_is_not_installed_any_more_is_not_known():
    with pytest.raises(InputError, match="unknown strategy 'everyother_k8'; allowed families: reg"):
        parse_strategy("everyother_k8")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("from pydantic", "from nowhere_at_all", "cannot be loaded: ModuleNotFoundError: No mod"),
        ("class EveryOther(", "class Another(", "cannot be loaded: AttributeError: module 'toy_r"),
        ("class EveryOther(Strategy)", "class EveryOther", "allowed: a subclass of moe_routing.r"),
        ("def selector", "def chooser", "without abstract methods"),
        ("words=\"every other expert\",", "", "cannot be loaded: TypeError: Family.__init__() mis"),
        ("\"every other expert\"", "\" \"", "has words = ' '; allowed: non-empty text"),
        ("family: ClassVar[Family]", "entry: ClassVar[Family]", "EveryOther has family = None; a"),
        ("\"everyother\",", "\"every_other\",", "name is 'every_other'; allowed: lower-case"),
        ("top {k}", "top {kk}", "definition names {kk}; allowed: {k}, {alpha}, {null}, {weigh"),
        ("#7A5CFF", "violet", "colour is 'violet'; allowed: six hexadecimal digits"),
        ("\"$E$\"", "\"\"", "marker is ''; allowed: a matplotlib marker"),
        ("\"everyother\",", "\"bh\",", "name 'bh' is taken by strategy BH of moe_routing.routing."),
        ("Every other\"", "Adaptive\"", "label 'Adaptive' is taken by strategy Adaptive of moe_r"),
        ("#7A5CFF", "#d55e00", "colour '#D55E00' is taken by strategy BH of moe_routing.routing."),
        ("\"$E$\"", "\"o\"", "marker 'o' is taken by strategy Regular of moe_routing.routing.stra"),
        ("words=", "static_weighting=\"softmax\", words=", "static_weighting 'softmax' is taken"),
    ],
)  # fmt: skip
def test_a_class_that_cannot_be_a_family_is_one_line_that_names_its_entry_point(
    offer, old, new, expected
):
    assert old in EVERY_OTHER
    offer(EVERY_OTHER.replace(old, new), every_other="toy_routing:EveryOther")
    with pytest.raises(InputError) as caught:
        parse_strategy("regular_k8")
    origin = (
        "entry point 'every_other' of 'moe_routing.strategies' (package toy-routing, "
        "toy_routing:EveryOther): "
    )
    message = str(caught.value)
    assert message.startswith(origin)
    assert expected in message.removeprefix(origin)
    assert "\n" not in message


def test_two_packages_cannot_offer_the_same_family(offer):
    offer(EVERY_OTHER, one="toy_routing:EveryOther", two="toy_routing:EveryOther")
    with pytest.raises(InputError, match=r"^entry point 'two' .* name 'everyother' is taken by en"):
        families()


def test_a_broken_entry_point_ends_the_validation_of_a_config_with_its_line(offer):
    offer("1 / 0", broken="toy_routing:Nothing")
    with pytest.raises(InputError, match=r"smoke\.yaml: strategies: entry point 'broken' .*Zero"):
        load_config(ROOT / "config" / "smoke.yaml")
