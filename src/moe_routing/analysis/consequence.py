"""The consequence law: what decides how far an expert moves the prediction.

Computed from the toggles of the study alone. Removals only: experts of the model's own choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from moe_routing.analysis.outputs import ALL_LAYERS
from moe_routing.analysis.tables import write_csv
from moe_routing.config.study import StudyConfig
from moe_routing.files import atomic_path
from moe_routing.routing.calibration import OUTPUTS_FILE, TOGGLES_FILE
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.toggles import Toggles
from moe_routing.statistics.law import consequence_law, spearman
from moe_routing.statistics.rules import COMPENSATED, OMITTED

PREDICTORS = ("weight", "norm", "weight_norm", "predicted")
"""What is compared with the effects: the weight, the norm of the output, their product, and the
product with the norm that calibration text predicts."""
EFFECTS = ("kl", "loss_size", "loss")
"""KL, the size of the change of the realised loss, and the change itself."""


def write_consequence(config: StudyConfig, results: Path) -> pd.DataFrame:
    """Write the tables of ``consequence/`` and return the law, one row per substitute and layer.

    Files: ``consequence_law.csv``, ``rank_correlations.csv``, ``removals.parquet`` (one row per
    removal, for the figure and the notebook).
    """
    del config
    calibration, folder = results / "calibration", results / "consequence"
    toggles = Toggles.load(calibration / TOGGLES_FILE)
    removals = removals_table(toggles, ExpertOutputs.load(calibration / OUTPUTS_FILE))
    with atomic_path(folder / "removals.parquet") as temporary:
        removals.to_parquet(temporary, index=False)
    law = law_table(removals)
    write_csv(law, folder / "consequence_law.csv")
    write_csv(correlation_table(removals), folder / "rank_correlations.csv")
    return law


def removals_table(toggles: Toggles, outputs: ExpertOutputs) -> pd.DataFrame:
    """Return one row per removal and substitute.

    Columns: ``dropped`` (omitted: nothing stands in for the expert; compensated: its mean output),
    ``token`` (index), ``layer``, ``expert``, ``weight``, ``norm`` (of what is missing: the output,
    or its deviation from the mean), ``weight_norm``, ``predicted`` (weight times the norm that the
    router's input predicts), ``kl`` and ``loss`` (nats; the realised loss after removal minus
    stock), ``loss_size``.
    """
    removed_P = toggles.rank_P < toggles.rule.top_k
    place = (toggles.layer_P[removed_P], toggles.token_P[removed_P], toggles.expert_P[removed_P])
    weight_P = toggles.weight_P[removed_P].double().numpy()
    layer_P, token_P, expert_P = (index.numpy() for index in place)
    parts = []
    for dropped, norm_LTE, slope_LEH, offset_LE, kl_P, loss_P in (
        (OMITTED, toggles.norm_LTE, outputs.slope_LEH, outputs.offset_LE,
         toggles.kl_P, toggles.loss_change_P),
        (COMPENSATED, toggles.deviation_LTE, outputs.deviation_slope_LEH,
         outputs.deviation_offset_LE, toggles.compensated_kl_P,
         toggles.compensated_loss_change_P),
    ):  # fmt: skip
        log_norm_LTE = toggles.hidden_LTH @ slope_LEH.mT + offset_LE[:, None]
        norm_P = norm_LTE[place].double().numpy()
        loss = loss_P[removed_P].numpy()
        parts.append(
            pd.DataFrame(
                {
                    "dropped": dropped,
                    "token": token_P,
                    "layer": layer_P,
                    "expert": expert_P,
                    "weight": weight_P,
                    "norm": norm_P,
                    "weight_norm": weight_P * norm_P,
                    "predicted": weight_P * np.exp(log_norm_LTE[place].double().numpy()),
                    "kl": kl_P[removed_P].numpy(),
                    "loss_size": np.abs(loss),
                    "loss": loss,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def law_table(removals: pd.DataFrame) -> pd.DataFrame:
    """Return the law of each substitute and layer; see :class:`ConsequenceLaw`."""
    rows = [
        {"dropped": dropped, "layer": layer, **_law(group)}
        for (dropped, layer), group in removals.groupby(["dropped", "layer"], sort=False)
    ]
    return pd.DataFrame(rows)


def _law(group: pd.DataFrame) -> dict[str, float | int]:
    return consequence_law(group["weight"], group["norm"], group["kl"], group["token"]).row()


def correlation_table(removals: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's correlation of predictors with effects within layers, and their mean.

    Columns: ``dropped``, ``layer`` (or ``all``: the mean of the layers), ``predictor``, ``effect``,
    ``spearman``, ``lower_loss`` (proportion of removals that lower the realised loss).
    """
    layers = pd.DataFrame(_correlations(removals))
    keys = ["dropped", "predictor", "effect"]
    means = layers.groupby(keys, sort=False)[["spearman", "lower_loss"]].mean().reset_index()
    layers["layer"] = layers["layer"].astype(str)
    return pd.concat([layers, means.assign(layer=ALL_LAYERS)], ignore_index=True)


def _correlations(removals: pd.DataFrame) -> Iterator[dict[str, object]]:
    for (dropped, layer), group in removals.groupby(["dropped", "layer"], sort=False):
        lower = float((group["loss"] < 0).mean())
        for predictor in PREDICTORS:
            for effect in EFFECTS:
                yield {
                    "dropped": dropped,
                    "layer": layer,
                    "predictor": predictor,
                    "effect": effect,
                    "spearman": spearman(group[predictor], group[effect]),
                    "lower_loss": lower,
                }
