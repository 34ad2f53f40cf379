"""The tables of the article: caption, sources, and what each needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from moe_routing import wording
from moe_routing.reporting import (
    replications,
    tables,
    tables_ablation,
    tables_budgets,
    tables_validity,
)
from moe_routing.reporting.findings_ablation import DISCOVERIES, HEADROOM
from moe_routing.reporting.findings_analyses import VERDICT_TABLE
from moe_routing.reporting.findings_budgets import middle_budget
from moe_routing.reporting.findings_consequence import LAW_FILE
from moe_routing.reporting.findings_needed import DEAD_EXPERTS, DEAD_LAYERS, RATES, WORST_EXPERTS
from moe_routing.reporting.pages import (
    BUDGETS_FILE,
    CELLS_FILE,
    CERTIFICATES,
    CONTROLS_FILE,
    LEVERS_FILE,
    METRICS_FILE,
    NUMERICS_FILE,
    TIMING_FILE,
)
from moe_routing.reporting.results import StudyResults
from moe_routing.vocabulary import DATASETS, EMBEDDED_TEXT_LICENSES, METRICS, text_dataset


@dataclass(frozen=True)
class ArticleTable:
    """A table of the article.

    Attributes:
        build: makes the table of a study.
        text: what it shows, and the files of its numbers, with fields in braces.
        align: one letter (l, r, c) per column, those without one to the right; None aligns the
            first two left.
        ready: whether a study has its inputs.
        needs: what a study lacks that is not ready.
    """

    build: Callable[[StudyResults], pd.DataFrame]
    text: str
    align: str | None = None
    ready: Callable[[StudyResults], bool] = lambda _: True
    needs: str = ""

    def caption(self, study: StudyResults) -> str:
        """Return the text with its fields filled in from a study."""
        text = text_dataset(study.datasets)
        sets = tables.perplexity_rows(study)["dataset"].drop_duplicates()
        return self.text.format(
            baseline=study.baseline,
            budget=wording.experts(middle_budget(study.budgets)),
            primary=study.config.statistics.primary.strategy,
            text_set=DATASETS[text].label,
            text_unit=METRICS[study.main_measures[text]].unit,
            confidence=wording.percent(study.config.statistics.confidence, 0),
            perplexity_sets=wording.listed([DATASETS[name].label for name in sets]),
        )


def _has(study: StudyResults, name: str, *kinds: str) -> bool:
    """Return whether a table of the statistics has rows, of these kinds if given."""
    table = study.statistics.get(name)
    if table is None or table.empty:
        return False
    return bool(table["kind"].isin(kinds).any()) if kinds else True


ARTICLE_TABLES: dict[str, ArticleTable] = {
    "tbl-results": ArticleTable(
        tables.results_table,
        "Every strategy on every data set, with {confidence} intervals. Bold: best in its column. "
        f"{tables.DAGGER}: significantly different from `{{baseline}}` after correction for "
        f"multiplicity. Mean experts are averaged over data sets. From `{CELLS_FILE}`.",
    ),
    "tbl-accuracy": ArticleTable(
        tables.accuracy_table,
        "Accuracy on the sets that are compared by another metric, with {confidence} intervals. "
        "Grey: `{baseline}` itself cannot be distinguished from guessing, so this column cannot "
        f"show what routing costs. From `{METRICS_FILE}`.",
        "l",
        lambda study: not tables.accuracy_rows(study).empty,
        "every set is compared by accuracy",
    ),
    "tbl-perplexity": ArticleTable(
        tables.perplexity_table,
        "{perplexity_sets} per word and per byte, with {confidence} intervals that resample "
        "documents: measures that do not depend on the tokenizer. Lower is better. From "
        f"`{METRICS_FILE}`.",
        "l",
        lambda study: not tables.perplexity_rows(study).empty,
        "this run has no running text",
    ),
    "tbl-divergence": ArticleTable(
        tables.divergence_table,
        "KL divergence of next-token predictions from those of `{baseline}`, in nats per token, "
        "with {confidence} intervals; n is the number of items. "
        f"From `{METRICS_FILE}`.",
        "l",
        lambda study: not study.divergence.empty,
        "divergence from the baseline's predictions was not measured",
    ),
    "tbl-data": ArticleTable(
        tables.data_table,
        "Evaluation sets. Tokens: all tokens that the model read, contexts included. Licence: that "
        "of the published set. Text that the embedded model was trained on: "
        f"{wording.listed(EMBEDDED_TEXT_LICENSES)}. From `{CELLS_FILE}` and `config.yaml`.",
        "llrrlll",
    ),
    "tbl-strategies": ArticleTable(
        tables.strategy_table,
        f"The strategies of this run, by family. From `{CELLS_FILE}`.",
        "llll",
    ),
    "tbl-replications": ArticleTable(
        replications.replications_table,
        "This run and smaller studies of other models, which this run does not recompute, with "
        "{confidence} intervals. Losses are in nats per token, on {text_set} in this run. Only "
        f"what every run has is shown. From `{replications.FILE}`.",
        "l",
        lambda study: not replications.replications_table(study).empty,
        "the config names no replications, or none that measured the same",
    ),
    "tbl-environment": ArticleTable(
        tables.environment_table,
        "Model, software and settings. From `model.json`, `config.yaml` and the provenance in "
        "`cells/<strategy>/<dataset>.json`.",
        "ll",
    ),
    "tbl-nulls": ArticleTable(
        tables.null_table,
        "The fitted nulls over layers: ratio of the spread above the median to the spread below it "
        "(1 if symmetric), the smallest possible p-value, and the proportion of a token's experts "
        "that are needed, where experts were toggled. From `calibration/nulls/<null>.csv`.",
        "llrrr",
        lambda study: any((study.folder / "calibration" / "nulls").glob("*.csv")),
        "this run has no diagnostics of its nulls",
    ),
    "tbl-primary": ArticleTable(
        tables.contrast_table,
        "The declared contrasts in their order, with {confidence} intervals; p of equivalence is "
        "that of both one-sided tests at the margin. From `statistics/primary.csv`.",
        "lllrrrrl",
        lambda study: not study.statistics["primary"].empty,
        "the declared contrasts were not computed",
    ),
    "tbl-budgets": ArticleTable(
        tables_budgets.main_table,
        "Loss over `{baseline}` at a budget of {budget} experts per token, as is, with "
        "{confidence} intervals: a fixed number, then the rules of lowest loss. Experts: those "
        "used on the first set. "
        f"{tables.DAGGER}: differs from a fixed number at the same mean experts (Holm within the "
        f"set). From `{BUDGETS_FILE}`.",
        "l",
        lambda study: not study.budgets.empty,
        "no rules were compared at matched budgets",
    ),
    "tbl-budgets-all": ArticleTable(
        tables_budgets.budgets_table,
        "Every setting at a budget, with {confidence} intervals, in the main metric of each set: "
        "loss over `{baseline}` (at fitted scale, over `{baseline}` at its own fitted scale), and "
        f"against a fixed number of experts at the same mean. {tables.DAGGER}: that difference is "
        "significant (Holm within the set). Ids that end in `scaled` are at fitted scale. "
        f"From `{BUDGETS_FILE}`.",
        "llrrr",
        lambda study: not study.budgets.empty,
        "no rules were compared at matched budgets",
    ),
    "tbl-levers-alone": ArticleTable(
        tables_budgets.levers_alone_table,
        "Each lever alone, at a budget of {budget}: loss on {text_set} in {text_unit}, minus that "
        "of a fixed number of experts at the same mean, with {confidence} intervals; negative is "
        f"better. {tables.DAGGER}: significant (Holm within the set). From `{LEVERS_FILE}`.",
        "llrr",
        lambda study: not tables_budgets.levers_alone(study).empty,
        "no lever was scored alone",
    ),
    "tbl-levers": ArticleTable(
        tables_budgets.levers_table,
        "Each setting against the rule without one lever at the same mean experts, with "
        "{confidence} intervals; negative is better. "
        f"{tables.DAGGER}: significant (Holm within the set). From `{LEVERS_FILE}`.",
        "lll",
        lambda study: _has(study, "levers"),
        "no two rules differ in one lever alone",
    ),
    "tbl-timing": ArticleTable(
        tables_budgets.timing_table,
        "Measured time for a fixed text, with {confidence} intervals over interleaved repeats. "
        f"From `{TIMING_FILE}`.",
        "lrr",
        lambda study: _has(study, "timing"),
        "time was not measured in repeats",
    ),
    "tbl-law": ArticleTable(
        tables_budgets.law_table,
        "The consequence law by layer, for removed experts with nothing in their place: slopes of "
        "log KL on log weight and log norm, with the variance that they explain (R²); the constant "
        "$c_l$ of the law, and the variance that it explains without fitted slopes; of what it "
        "leaves, the part that lies between tokens. "
        f"From `{LAW_FILE}`.",
        "rrrrrrr",
        lambda study: not study.table(LAW_FILE).empty,
        "the analysis consequence/ was not run",
    ),
    "tbl-certified": ArticleTable(
        tables_budgets.certified_table,
        "Certified strategies: the promise for text like the calibration documents, and KL from "
        "the predictions of `{baseline}`, in nats per token, on those documents and held out, with "
        "{confidence} intervals; n is the number of documents or items. From "
        f"`{CERTIFICATES}/<strategy>.json`, `{METRICS_FILE}` and `{BUDGETS_FILE}`.",
        "lllrr",
        lambda study: bool(study.certificates),
        "no strategy was certified",
    ),
    "tbl-discoveries": ArticleTable(
        tables_ablation.discoveries_table,
        "What discoveries are worth, over all layers, at the level nearest to that of the primary "
        "strategy, with {confidence} intervals; rates in percent. Own, others: discoveries per "
        "token and layer among the experts of the model's own choice and among all others. The "
        "false discovery rate is about all discoveries, by KL and its epsilon in nats; false by "
        "loss and harmful are proportions of those of the own choice. From "
        f"`{DISCOVERIES}`.",
        "lrrrrrr",
        lambda study: not study.table(DISCOVERIES).empty,
        "the analysis ablation/ was not run",
    ),
    "tbl-headroom": ArticleTable(
        tables_ablation.headroom_table,
        "Orders of the experts of the model's own choice at equal number kept in every layer, at "
        "one token: mean KL from stock in nats, the difference from the router's order on the same "
        "tokens, and the part of the distance to the order by measured effect that an order "
        "closes, with {confidence} intervals. "
        f"From `{HEADROOM}`.",
        "rlrrr",
        lambda study: not study.table(HEADROOM).empty,
        "the analysis ablation/ was not run",
    ),
    "tbl-controls-primary": ArticleTable(
        tables.primary_controls_table,
        "Controls of `{primary}`: difference, control minus `{primary}`, with {confidence} "
        f"interval. {tables.DAGGER}: significant after correction for multiplicity. Arrows point "
        f"to better values; experts are means per token over data sets. From `{CONTROLS_FILE}`.",
        "l",
        lambda study: not tables.primary_controls(study).empty,
        "no controls of the primary strategy were scored",
    ),
    "tbl-controls": ArticleTable(
        tables.controls_table,
        "Each control against its base: difference, control minus base, with {confidence} "
        f"interval. {tables.DAGGER}: significant after correction for multiplicity. Arrows point "
        f"to better values; experts are means per token over data sets. From `{CONTROLS_FILE}`.",
        "l",
        lambda study: _has(study, "controls", *tables.shown_kinds()),
        "no controls were scored",
    ),
    "tbl-static": ArticleTable(
        tables.static_table,
        "Static top-k with the model's own weights at every k that was scored, with {confidence} "
        f"intervals. Bold: best of its column. From `{CELLS_FILE}` and `comparison/controls.csv`.",
        "l",
        lambda study: study.static_curve["k"].nunique() > 1,
        "this run has fewer than two static settings",
    ),
    "tbl-numerics": ArticleTable(
        tables.numerics_table,
        "The baseline `{baseline}` against itself with other numerics. The largest change of an "
        f"item is that of its log-likelihood, in nats. From `{NUMERICS_FILE}`.",
        "llrrrr",
        lambda study: _has(study, "numerics"),
        "the baseline was not scored again with other numerics",
    ),
    "tbl-routing": ArticleTable(
        tables.routing_table,
        "Routing by BH, averaged over data sets. A decision is one token in one layer. Nothing "
        "rejected: BH selected no expert, so the floor decided. At floor, at cap: BH selected "
        "fewer or more experts than allowed, so the floor or cap decided. From "
        f"`{CELLS_FILE}`.",
        "llrrrrr",
        lambda study: "bh" in study.families,
        "this run has no Benjamini-Hochberg routing",
    ),
    "tbl-rates": ArticleTable(
        tables_validity.rates_table,
        "Held-out false discovery rate under `needed`, in percent, with {confidence} intervals "
        "that resample documents: mean over layers. Layers: those whose own interval has its lower "
        "end at or below alpha; then the layer whose lower end is largest, and the widest half "
        "interval of a layer. BY and BH with block-exact p-values stand beside; resolution: too "
        "few calibration tokens for that level. Experts: what BH selects per token, without floor "
        f"and cap. From `{RATES}`.",
        "lrrlrrrrrr",
        lambda study: not study.table(RATES).empty,
        "the analysis validity/ was not run",
    ),
    "tbl-dead": ArticleTable(
        tables_validity.dead_table,
        "Where experts are dead, in percent, with {confidence} intervals. All dead: tokens for "
        "which anything is selected in a layer without its experts (mean over layers; layers whose "
        "own interval has its lower end at or below alpha), by procedure and score. Some dead: "
        "false discovery rate of BH, likewise; dead slots: kept experts that are dead. From "
        f"`{DEAD_LAYERS}` and `{DEAD_EXPERTS}`.",
        "rrrrrrr",
        lambda study: not (study.table(DEAD_LAYERS).empty or study.table(DEAD_EXPERTS).empty),
        "the analysis validity/ was not run",
    ),
    "tbl-worst": ArticleTable(
        tables_validity.worst_table,
        "Experts whose own selected slots are needed least, in percent of the slots, with "
        "{confidence} intervals of each and with intervals that hold for all experts at once. "
        f"From `{WORST_EXPERTS}`.",
        "rrrrrr",
        lambda study: not study.table(WORST_EXPERTS).empty,
        "the analysis validity/ was not run",
    ),
    "tbl-size": ArticleTable(
        tables_validity.sizes_table,
        "Size of BH under the complete null (weak control), in percent of the tokens, for the "
        "nulls about the logits alone: in the designs that judge them, with simultaneous intervals "
        "in the worst layer, and if all of the real logits were noise, which takes no part in the "
        f"verdict. From `{VERDICT_TABLE}`.",
        "llrlll",
        lambda study: not study.table(VERDICT_TABLE).empty,
        "the analysis validity/ was not run",
    ),
}
"""By cross-reference label."""
