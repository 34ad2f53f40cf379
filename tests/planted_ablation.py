"""Tables of the ablation whose effects are known: every sentence can go either way."""

from __future__ import annotations

import numpy as np
import pandas as pd
from planted_pairs import EXPERTS, TOP_K, planted_pairs

from moe_routing.analysis.discoveries import (
    Criterion,
    SelectedByRule,
    false_discoveries,
    false_kept,
    left_out,
    own_choice,
)
from moe_routing.analysis.needs import class_contrasts, needed_experts, presence
from moe_routing.analysis.together import headroom, joint_removals

EPSILON, TOKENS, LAYERS = 1e-5, 240, 4
PRIMARY = {"kl": EPSILON, "loss": 0.01}
DOCUMENT_T = np.arange(TOKENS) // 2
ORDERS = {"exact_norm": 0.1, "norm": 0.3, "router": 0.6, "effect": 0.0}


def settings():
    """Return how intervals are made."""
    return {"confidence": 0.95, "resamples": 200, "rng": np.random.default_rng(1)}


def effects(seed=2):
    """Return KL and gain of every expert: a fifth has no effect; half of the gains are losses."""
    rng = np.random.default_rng(seed)
    shape = (LAYERS, TOKENS, EXPERTS)
    kl_LTE = np.where(rng.random(shape) < 0.2, 1e-7, 1e-3 * np.exp(rng.normal(0, 1, shape)))
    gain_LTE = rng.choice([-1, 1], shape) * np.where(kl_LTE < EPSILON, 1e-4, 0.05)
    return kl_LTE, gain_LTE


def ablation_table(false=0.02, *, alphas=(0.01, 0.05), useful=0.5):
    """Return ``ablation.csv`` of the own choice, of a null, and of one that discovers nothing.

    Args:
        false: chance that an expert without an effect is discovered; those with one are.
        alphas: levels, at all of which the same is discovered.
        useful: proportion of the discovered experts whose presence lowers the loss.
    """
    kl_LTE, gain_LTE = effects()
    rng = np.random.default_rng(4)
    found_LTE = (kl_LTE >= EPSILON) | (rng.random(kl_LTE.shape) < false)
    helps_LTE = rng.random(kl_LTE.shape) < useful
    gain_LTE = np.where(found_LTE, np.where(helps_LTE, 1, -1) * np.abs(gain_LTE), gain_LTE)
    pairs = planted_pairs(kl_LTE, gain_LTE, per_document=2)
    criteria = [Criterion("kl", EPSILON), Criterion("loss", 0.01), Criterion("loss", 0.1)]
    nothing_LTE = np.zeros_like(found_LTE)
    rules = [own_choice(pairs, PRIMARY)]
    for alpha in alphas:
        rules.append(SelectedByRule("needed", alpha, found_LTE, PRIMARY))
        rules.append(SelectedByRule("pooled", alpha, nothing_LTE, PRIMARY))
    tables = [false_discoveries(pairs, rule, criteria, **settings()) for rule in rules]
    return pd.concat(tables, ignore_index=True)


def left_out_table(*, small=True):
    """Return ``left_out.csv`` of an arm that leaves out the needed experts of small effect, or not.

    Args:
        small: whether those are the smallest quarter of the effects, or all others.
    """
    kl_LTE, _ = effects()
    above_LTE = kl_LTE > np.quantile(kl_LTE[kl_LTE >= EPSILON], 0.25)
    chosen_LTE = above_LTE if small else ~above_LTE
    pairs = planted_pairs(kl_LTE, per_document=2)
    table = left_out(
        pairs, SelectedByRule("needed", 0.05, chosen_LTE, PRIMARY), [EPSILON, 1e-4], confidence=0.95
    )
    named = {"strategy": "bh_k8_a005", "null": "needed", "alpha": 0.05}
    return pd.concat([table.assign(bounded=flag, **named) for flag in (False, True)])


def states_table(*, stock=0.02, routed=0.02):
    """Return ``states.csv``, given the chance that a false expert is kept in either model."""
    tables = []
    for states, chance in {"stock": stock, "routed": routed}.items():
        kl_LTE, _ = effects()
        rng = np.random.default_rng(5)
        kept_LTE = (kl_LTE >= EPSILON) | (rng.random(kl_LTE.shape) < chance)
        pairs = planted_pairs(kl_LTE, per_document=2)
        table = false_kept(pairs, kept_LTE, EPSILON, **settings())
        tables.append(table.assign(states=states))
    return pd.concat(tables).assign(strategy="bh_k8_a005", alpha=0.05, epsilon=EPSILON)


def token_table():
    """Return one row per token, as in ``held_out/tokens/``."""
    rng = np.random.default_rng(6)
    columns = {name: rng.random(TOKENS) for name in ("frequency", "position", "loss")}
    return pd.DataFrame(columns).assign(document=DOCUMENT_T, word_start=rng.random(TOKENS) < 0.5)


def needs_tables(harder=1.0, *, useful=0.5):
    """Return the three tables of needed experts.

    Args:
        harder: factor of the effects of tokens with a loss in the upper half.
        useful: proportion of experts beyond the own choice whose presence lowers the loss.
    """
    tokens = token_table()
    kl_LTE, gain_LTE = effects()
    kl_LTE[:, tokens["loss"] > 0.5] *= harder
    rng = np.random.default_rng(7)
    sign_LTE = np.where(rng.random(kl_LTE.shape) < useful, 1, -1)
    gain_LTE[..., TOP_K:] = (sign_LTE * np.abs(gain_LTE))[..., TOP_K:]
    pairs, epsilons = planted_pairs(kl_LTE, gain_LTE, per_document=2), [EPSILON, 1e-3]
    tables = {
        "needed_experts": needed_experts(pairs, tokens, epsilons, **settings()),
        "class_contrasts": class_contrasts(pairs, tokens, [1e-3], **settings()),
        "presence": presence(pairs, epsilons, confidence=0.95),
    }
    return {name: table.assign(text="calibration") for name, table in tables.items()}


def together_table(factor=1.5, orders=None):
    """Return joint removals as in ``held_out/together/``.

    Args:
        factor: KL of a joint removal over the sum of single ones.
        orders: log of the KL of each order over that by measured effect.
    """
    rng = np.random.default_rng(8)
    rows = []
    for token in range(TOKENS):
        single = np.exp(rng.normal(-7, 0.5, LAYERS))
        for layer, one in enumerate([*single, single.sum()]):
            name = "all" if layer == LAYERS else str(layer)
            count = 2 * LAYERS if layer == LAYERS else 2
            rows.append((token, "bh", 0, name, count, one * factor, one))
        for k in (1, 2):
            best = np.exp(rng.normal(-4 - k, 0.3))
            for order, distance in (orders or ORDERS).items():
                kl = best * np.exp(distance + 0.1 * (order != "effect") * rng.normal())
                rows.append((token, order, k, "all", LAYERS * (TOP_K - k), kl, kl))
    columns = ["token", "order", "k", "layer", "removed", "kl", "sum_kl"]
    return pd.DataFrame(rows, columns=columns).assign(loss_change=0.001)


def write_held_out(files, toggles, texts):
    """Write the files of held-out interventions that the ablation reads.

    Args:
        files: their names.
        toggles: of every text, and of the routed model.
        texts: names of the texts.
    """
    layers, tokens, _ = toggles.logits_LTE.shape
    rng = np.random.default_rng(9)
    place = np.zeros((tokens, 2), dtype=int)
    place[toggles.token_P] = np.stack([toggles.document_P, toggles.position_P], axis=1)
    table = pd.DataFrame(place, columns=["document", "position"]).assign(
        token_id=0,
        token="a",  # noqa: S106
        frequency=rng.integers(0, 99, tokens),
        word_start=rng.random(tokens) < 0.5,
        loss=rng.exponential(3, tokens),
    )
    rows = []
    for token in range(tokens):
        for layer in range(layers):
            rows.append((token, "bh", 0, str(layer), 2, *rng.exponential(0.001, 3)))
        rows.append((token, "bh", 0, "all", 2 * layers, *rng.exponential(0.01, 3)))
        for k in (2, 3, 4):
            for order in ORDERS:
                rows.append((token, order, k, "all", layers * k, *rng.exponential(0.01, 3)))
    columns = ["token", "order", "k", "layer", "removed", "kl", "loss_change", "sum_kl"]
    together = pd.DataFrame(rows, columns=columns)
    toggles.save(files.routed)
    for text in texts:
        toggles.save(files.toggles(text))
        for path, frame in ((files.tokens(text), table), (files.together(text), together)):
            path.parent.mkdir(exist_ok=True)
            frame.to_parquet(path)


def joint_table(factor=1.5):
    """Return ``joint_removals.csv``."""
    table = joint_removals(together_table(factor), DOCUMENT_T, **settings())
    return table.assign(text="calibration")


def headroom_table(orders=None):
    """Return ``headroom.csv``."""
    table = headroom(together_table(orders=orders), DOCUMENT_T, **settings())
    return table.assign(text="calibration")


def all_tables():
    """Return every table of the ablation by name."""
    return {
        "ablation": ablation_table(),
        "left_out": left_out_table(),
        "states": states_table(),
        **needs_tables(),
        "joint_removals": joint_table(),
        "headroom": headroom_table(),
    }
