"""Sentences about discoveries and about what is left out, both ways, from planted effects."""

from __future__ import annotations

import pandas as pd
import planted_ablation as planted
import pytest
from planted_results import planted_config

from moe_routing import wording
from moe_routing.reporting import findings_ablation as findings
from moe_routing.wording import MINUS


def about(null, table, config=None):
    found = findings.discoveries(table, config or planted_config())
    (one,) = [finding for finding in found if f"Under `{null}`" in finding.text]
    return one


def test_the_own_choice_comes_first():
    first, *rest = findings.discoveries(planted.ablation_table(), planted_config())
    assert first.verdict == "reference"
    assert first.text.startswith("Of 2,880 experts that the stock router had chosen, the removal ")
    assert f"by less than {wording.scientific(1e-5)} nats (KL)" in first.text
    assert "these experts are harmful" in first.text
    assert len(rest) == 2


@pytest.mark.parametrize(
    ("false", "verdict", "said"),
    [
        (0.02, "held", ", not shown to be above alpha 0.05. No single layer is above it."),
        (0.9, "exceeded", " over all layers, above alpha 0.05. Layers 0, 1, 2 and 3 are above it."),
    ],
)  # fmt: skip
def test_a_null_that_holds_and_one_that_fails(false, verdict, said):
    finding = about("needed", planted.ablation_table(false))
    assert finding.verdict == verdict
    assert said in finding.text
    assert finding.text.startswith("Under `needed` at alpha 0.05, BH discovers ")
    assert f"(KL below {wording.scientific(1e-5)} nats)" in finding.text


@pytest.mark.parametrize(
    ("useful", "said"),
    [
        (0.9, "when removed, fewer than among its whole choice. The harmful ones"),
        (0.5, "when removed, not shown to differ from those among its whole choice. The"),
        (0.1, "when removed, more than among its whole choice. The harmful ones"),
    ],
)
def test_the_worth_of_discoveries_is_compared_with_the_own_choice(useful, said):
    """All of the own choice but a fifth is discovered; the rest of it is always a waste."""
    table = planted.ablation_table(0.02, useful=useful)
    stock = table["null"] == "none"
    # The own choice as it is without what was planted into the discoveries.
    table.loc[stock] = planted.ablation_table(0.02, useful=0.5)[stock]
    if useful == 0.5:
        table.loc[stock, ["false_low", "false_high"]] = [0.3, 0.7]
    assert said in about("needed", table).text


def test_a_null_without_discoveries_claims_nothing():
    finding = about("pooled", planted.ablation_table())
    assert finding.verdict == "no discovery"
    assert finding.text.endswith("BH discovers no expert in 960 decisions.")
    table = planted.ablation_table()
    table.loc[table["null"] == "pooled", "n_discoveries"] = 7
    assert about("pooled", table).verdict == "few"
    assert findings.discoveries(pd.DataFrame(), planted_config()) == []


@pytest.mark.parametrize(
    ("strategy", "alpha"),
    [("bh_k8_a005", "0.04"), ("bh_k8_a001", "0.02"), ("adaptive_k8", "0.1")],
)
def test_the_level_is_that_of_the_primary_strategy(strategy, alpha):
    table = planted.ablation_table(alphas=(0.1, 0.02, 0.04))
    config = planted_config(primary=(strategy, "hellaswag"))
    assert f"at alpha {alpha}, " in about("needed", table, config).text


@pytest.mark.parametrize(
    ("small", "verdict", "said"),
    [(True, "small", ": mostly small ones."), (False, "not small", ": not only small ones.")],
)
def test_what_is_left_out(small, verdict, said):
    table = planted.left_out_table(small=small)
    finding = findings.left_out(table)
    assert finding.verdict == verdict
    assert said in finding.text
    rows = table[(table["layer"] == "all") & (table["epsilon"] == planted.EPSILON)]
    own = rows[rows["part"] == "removed"].iloc[0]
    assert f"leaves out {100 * own['left_out']:.1f} % [" in finding.text
    assert f"have {100 * own['effect_left_out']:.1f} % of the sum" in finding.text
    free = f"BH leaves out {100 * own['left_out']:.1f} % at alpha 0.05 of the needed experts of the"
    assert finding.text.endswith(f"{free} own choice.")
    assert findings.left_out(pd.DataFrame()) is None


@pytest.mark.parametrize(
    ("factor", "verdict", "said"),
    [
        (1.5, "more", " times the sum of the single effects, more than the sum"),
        (0.7, "less", "single effects, less than the sum"),
        (1.0, "open", "not shown to differ from the sum"),
    ],
)
def test_joint_removals(factor, verdict, said):
    finding = findings.joint(planted.joint_table(factor))
    assert finding.verdict == verdict
    assert said in finding.text
    assert "choice (8 experts), removed together" in finding.text
    assert f"Within single layers it is {factor:.2f} to {factor:.2f} times" in finding.text


def test_an_arm_that_leaves_out_nothing():
    table = planted.joint_table()
    table["mean_removed"] = 0.0
    assert findings.joint(table).verdict == "nothing"
    assert findings.joint(pd.DataFrame()) is None


@pytest.mark.parametrize(
    ("stock", "routed", "verdict"),
    [
        (0.02, 0.02, "held, same"),
        (0.02, 0.9, "exceeded, moved"),
        (0.9, 0.02, "held, moved"),
        (0.9, 0.9, "exceeded, same"),
    ],
)
def test_the_states_of_the_routed_model(stock, routed, verdict):
    finding = findings.states(planted.states_table(stock=stock, routed=routed))
    assert finding.verdict == verdict
    held, moved = verdict.split(", ")
    word = "not shown to be " if held == "held" else ""
    assert f"], {word}above alpha 0.05. In those" in finding.text
    word = "differ" if moved == "moved" else "were not shown to differ"
    assert finding.text.endswith(f"; the two {word}.")
    assert findings.states(pd.DataFrame()) is None


def test_needed_experts():
    table = planted.needs_tables()["needed_experts"]
    finding = findings.needed(table)
    rows = table[(table["class"] == "all tokens") & (table["layer"] == "all")]
    for number, row in enumerate(rows.sort_values("epsilon").itertuples()):
        mean = wording.interval(row.mean, row.low, row.high)
        name = "" if number else "epsilon "
        assert f"{mean} at {name}{wording.scientific(row.epsilon)}" in finding.text
    assert findings.needed(pd.DataFrame()) is None


@pytest.mark.parametrize(("harder", "verdict"), [(3.0, "some"), (1.0, "none"), (1 / 3, "some")])
def test_classes_that_need_more_and_classes_that_do_not(harder, verdict):
    finding = findings.contrasts(planted.needs_tables(harder)["class_contrasts"])
    assert finding.verdict == verdict
    badly, well = "tokens before a badly predicted one", "tokens before a well predicted one"
    if verdict == "none":
        assert f"between {well} and {badly}" in finding.text
        assert " more than " not in finding.text
    else:
        more, fewer = (badly, well) if harder > 1 else (well, badly)
        assert finding.text.startswith(f"At epsilon 0.001, {more} need ")
        assert f"experts more than {fewer}. No difference could be shown between" in finding.text
        assert MINUS not in finding.text
    assert findings.contrasts(pd.DataFrame()) is None


@pytest.mark.parametrize(
    ("useful", "verdict", "said"),
    [
        (0.8, "helps", "in more than half"),
        (0.2, "hurts", "in fewer than half"),
        (0.5, "open", "not shown to be more or fewer than half"),
    ],
)
def test_experts_beyond_the_own_choice(useful, verdict, said):
    finding = findings.presence(planted.needs_tables(useful=useful)["presence"])
    assert finding.verdict == verdict
    assert f", {said}." in finding.text
    assert f"are consequential at epsilon {wording.scientific(1e-5)}" in finding.text


def test_no_expert_beyond_the_own_choice():
    table = planted.needs_tables()["presence"]
    table.loc[table["part"] == "added", "n_toggled"] = 0
    assert findings.presence(table).verdict == "none"
    assert findings.presence(pd.DataFrame()) is None


@pytest.mark.parametrize(
    ("orders", "verdict", "said"),
    [
        ({"norm": 0.3, "router": 0.6}, "better", "is better than the router's."),
        ({"norm": 0.9, "router": 0.6}, "worse", "is worse than the router's."),
        ({"norm": 0.6, "router": 0.6}, "open", "was not shown to differ from the router's."),
        ({"norm": -0.2, "router": -0.3}, "no room", "no room for a better order could be shown."),
    ],
)
def test_a_score_that_helps_and_one_that_does_not(orders, verdict, said):
    table = planted.headroom_table({"effect": 0.0, "exact_norm": 0.1, **orders})
    found = findings.headroom(table)
    assert [finding.verdict for finding in found] == [verdict] * 2
    assert said in found[0].text
    assert found[1].text.startswith(
        "At one token, 2 experts of the model's own choice were kept in every layer. The KL in the "
    )
    assert ("Of this room" in found[0].text) == (verdict != "no room")
    assert findings.headroom(pd.DataFrame()) == []


@pytest.mark.parametrize(
    ("norms", "verdict", "where"),
    [
        ((0.3, 0.3), "better", "at every number."),
        ((0.3, 0.6), "partly", "at 1 only."),
        ((0.6, 0.6), "open", "at no number."),
    ],
)
def test_orders_on_other_texts(norms, verdict, where):
    orders = [{"effect": 0.0, "exact_norm": 0.1, "norm": x, "router": 0.6} for x in norms]
    first, second = (planted.headroom_table(one) for one in orders)
    other = pd.concat([first[first["k"] == 1], second[second["k"] == 2]]).assign(text="lambada")
    *_, finding = findings.headroom(pd.concat([planted.headroom_table(), other]))
    assert finding.verdict == verdict
    assert finding.text.startswith("On contexts of LAMBADA, weight times predicted norm closes ")
    assert finding.text.endswith(f"with 1 and 2 experts kept. It was shown to be better than the "
                                 f"router's order {where}")  # fmt: skip


def test_another_text_without_room():
    orders = {"effect": 0.0, "exact_norm": 0.1, "norm": 0.1, "router": -0.3}
    other = planted.headroom_table(orders).assign(text="lambada")
    *_, finding = findings.headroom(pd.concat([planted.headroom_table(), other]))
    assert finding.verdict == "no room"


def test_other_texts_are_named():
    joint = pd.concat([planted.joint_table(), planted.joint_table(0.8).assign(text="hellaswag")])
    finding = findings.joint(joint)
    assert finding.verdict == "more"
    assert finding.text.count("On contexts of HellaSwag it is ") == 1
    assert finding.text.endswith(" times the sum of the single effects.")
    needed = planted.needs_tables()["needed_experts"]
    other = needed.assign(text="lambada", mean=1.25)
    finding = findings.needed(pd.concat([needed, other]))
    assert finding.text.endswith(" At this epsilon it is 1.25 on contexts of LAMBADA.")


def test_beside_the_rate_stand_three_findings():
    found = list(
        findings.beside(planted.left_out_table(), planted.joint_table(), planted.states_table())
    )
    assert [one.source for one in found] == [findings.LEFT_OUT, findings.JOINT, findings.STATES]
