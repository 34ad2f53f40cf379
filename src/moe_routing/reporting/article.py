"""What the manuscript's cells call: every number, sentence, table and figure from result files.

A cell ends in one of these calls and its value is Markdown; inline code uses the same values. So
the same source renders by Quarto, by the preview and in a notebook.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moe_routing.config.study import config_file
from moe_routing.errors import InputError
from moe_routing.reporting import findings as f
from moe_routing.reporting import findings_controls as c
from moe_routing.reporting import findings_routing as g
from moe_routing.reporting import findings_validity as v
from moe_routing.reporting import tables
from moe_routing.reporting import wording as w
from moe_routing.reporting.article_figures import GALLERY, Picture
from moe_routing.reporting.article_tables import SHEETS, Sheet
from moe_routing.reporting.comparison_report import headline
from moe_routing.reporting.findings_analyses import ablation, recommendation, router, validity
from moe_routing.reporting.missing import missing
from moe_routing.reporting.protocol import PROSE, has_bh
from moe_routing.reporting.results import Study
from moe_routing.routing.strategies import family_entry
from moe_routing.vocabulary import DATASETS, METRICS

VARIABLE = "MOE_ROUTING_RESULTS"
"""Environment variable that names the results folder."""

DEFAULT = Path("results") / "default"
DEFAULT_CONFIG = "config/config.yaml"
"""The config file that the workflow reads where none is given."""


_TIES = re.compile(r"(?<=\d) (?=%)|(?<=\b[pn]) (?=[<=>])|(?<=\b[pn] [<=>]) (?=\d)")
"""Spaces that must not end a line: 95 %, p < 0.001, n = 200."""


class Markdown(str):
    """Text that notebooks show as Markdown."""

    __slots__ = ()

    def _repr_markdown_(self) -> str:
        return str(self)


def results_folder() -> Path:
    """Return the folder that the environment names, or results/default.

    A relative path is looked for here and in every folder above.

    Raises:
        InputError: it holds no study.
    """
    named = os.environ.get(VARIABLE)
    wanted = Path(named) if named else DEFAULT
    here = Path.cwd()
    for folder in (here, *here.parents):  # a page's cells run in its own folder
        if (folder / wanted / "config.yaml").is_file():
            return folder / wanted
    said = f"{VARIABLE}={named}" if named else f"{VARIABLE} is not set"
    raise InputError(f"{said}: no config.yaml in {wanted}, here ({here}) or in a folder above")


@dataclass(frozen=True)
class Article:
    """A study as the manuscript shows it.

    Attributes:
        study: what is shown.
        plain: write captions and sources without pandoc's labels and classes, which a notebook
            would show as they are.
    """

    study: Study
    plain: bool = False

    @classmethod
    def load(cls, folder: Path | str | None = None, *, plain: bool = False) -> Article:
        """Read the results folder; see :func:`results_folder`."""
        return cls(Study.load(folder or results_folder()), plain)

    # Names and small numbers for running text.

    @property
    def model(self) -> Markdown:
        """The model as the text names it."""
        return Markdown(self.study.model.phrase)

    @property
    def topology(self) -> Markdown:
        """The model's layers, experts and native k."""
        return Markdown(self.study.model.topology)

    @property
    def scope(self) -> Markdown:
        """What the findings may be generalised to."""
        if not self.study.model.is_small:
            return Markdown("The findings are about this model and these data.")
        return Markdown("The findings are about a small model and need not hold for larger ones.")

    @property
    def citations(self) -> Markdown:
        """The evaluation sets with their citations."""
        names = tables.datasets_by_task(self.study)
        return Markdown(
            w.listed([f"{DATASETS[name].label} {DATASETS[name].citation}" for name in names])
        )

    @property
    def command(self) -> Markdown:
        """The command that makes the study."""
        file = config_file(self.study.folder)
        given = "" if file == DEFAULT_CONFIG else f" --configfile {file}"
        return Markdown(f"`snakemake --cores all{given}`")

    @property
    def datasets(self) -> Markdown:
        """The evaluation sets with their numbers of items."""
        study = self.study
        return Markdown(
            w.listed(
                [
                    f"{DATASETS[name].label} "
                    f"({w.count(study.cell(study.baseline, name)['n_items'])} items)"
                    for name in tables.datasets_by_task(study)
                ]
            )
        )

    @property
    def baseline(self) -> Markdown:
        """The baseline strategy."""
        return Markdown(f"`{self.study.baseline}`")

    @property
    def primary_contrast(self) -> Markdown:
        """The contrast declared before the run."""
        contrast = self.study.config.statistics.primary
        return Markdown(f"`{contrast.strategy}` on {DATASETS[contrast.dataset].label}")

    @property
    def margins(self) -> Markdown:
        """The non-inferiority margins."""
        settings = self.study.config.statistics
        return Markdown(
            f"{w.magnitude(settings.margin_accuracy, 'accuracy')} of accuracy and "
            f"{w.magnitude(settings.margin_nats, 'nats_per_token')}"
        )

    @property
    def confidence(self) -> Markdown:
        """The level of intervals."""
        return Markdown(w.percent(self.study.config.statistics.confidence, 0))

    @property
    def families(self) -> Markdown:
        """The families that were run, in words."""
        words = [family_entry(name).words for name in self.study.families]
        return Markdown(w.listed(words))

    def number(self, name: str) -> Markdown:
        """Return a count or setting by name.

        Raises:
            InputError: there is no such number.
        """
        study, settings = self.study, self.study.config.statistics
        numbers = {
            "cells": len(study.cells),
            "strategies": study.cells["strategy"].nunique(),
            "calibration_tokens": study.config.calibration.tokens,
            "resamples": settings.resamples,
            "seed": study.config.seed,
            "layers": study.model.layers,
            "experts": study.model.experts,
            "top_k": study.model.top_k,
        }
        if name not in numbers:
            raise InputError(f"number '{name}'; allowed: {', '.join(numbers)}")
        return Markdown(w.count(numbers[name]))

    def text(self, name: str) -> Markdown:
        """Return prose that depends on what the study has.

        Raises:
            InputError: there is no such text.
        """
        if name not in PROSE:
            raise InputError(f"text '{name}'; allowed: {', '.join(PROSE)}")
        return Markdown(_tied(PROSE[name](self.study)))

    # Sentences.

    @cached_property
    def _sentences(self) -> dict[str, list[f.Finding]]:
        study, table = self.study, self.study.statistics
        families = study.family_of
        top_k, baseline = study.model.top_k, study.baseline
        main = study.main_measures
        margin = study.config.statistics.margin_accuracy
        found = {
            "headline": headline(study),
            "primary": [f.primary(table["primary"], study.config.statistics.confidence)],
            "compute": [f.compute(table["primary"])],
            "matched": [f.matched(table["primary"])],
            "power": [f.detectable(table["primary"])],
            "chance": f.chance(study.cells, baseline, margin),
            "baseline": f.against_baseline(
                table["paired"], table["noninferiority"], families, baseline
            ),
            "matched_summary": g.matched_summary(table["matched_compute"], families),
            "fewest": f.fewest_static(table["noninferiority"], study.cells, top_k),
            "weighting": [f.weighting(table["paired"], top_k)],
            "binding": [g.binding(study.cells, study.config.parsed)],
            "cap": [g.cap(study.cells)],
            "pareto": g.pareto(table["pareto"], baseline),
            "pareto_time": g.pareto(table["pareto_time"], baseline, "seconds_per_1000_tokens"),
            "ranks": [g.ranks(table["friedman"], study.config.statistics.confidence)],
            "speed": [g.speed(study.cells, baseline)],
            "static_curve": c.static_curve(study.static_curve, table["controls"], main, top_k),
            "controls": c.controls(table["controls"], main, study.config.parsed),
            "numerics": [
                *c.numerics(table["numerics"], main),
                *c.beyond_noise_floor(table["numerics"], table["paired"], main),
            ],
            "primary_noise_floor": [
                c.primary_noise_floor(table["primary"], table["numerics"], main)
            ],
            "divergence": [c.divergence(study.divergence, baseline)],
            "missing": missing(study),
            "router": router(study.folder),
            "recommendation": recommendation(study.folder),
            "procedures": v.procedures(
                study.table("validity/simulation.csv"), study.config.statistics.confidence
            ),
            "specialisation": [
                v.domains(study.table("baseline/domain_specialisation.csv")),
                v.coactivation(study.table("baseline/coactivation.csv")),
                v.vocabulary(study.table("baseline/vocabulary_specialisation.csv")),
            ],
            "validity": validity(study.table("validity/verdict.csv"), study.cells["null"]),
            "ablation": ablation(study.table("ablation/ablation.csv"), study.config),
        }
        return {name: [x for x in listed if x is not None] for name, listed in found.items()}

    def say(self, names: str, otherwise: str = "") -> Markdown:
        """Return the sentences of a topic as running text, and the files of their numbers.

        Several topics, separated by blanks, name each file once.
        """
        found = [finding for name in names.split() for finding in self._topic(name)]
        if not found:
            return Markdown(otherwise)
        text = _tied(" ".join(finding.text for finding in found))
        sources = ", ".join(dict.fromkeys(finding.source for finding in found))
        return Markdown(f"{text} {self._source(sources)}")

    def listing(self, name: str, otherwise: str = "Nothing.") -> Markdown:
        """Return the sentences of a topic as a list, each with the file of its numbers."""
        lines = map(self._bullet, self._topic(name))
        return Markdown("\n".join(lines) or otherwise)

    def _bullet(self, finding: f.Finding) -> str:
        return f"- {_tied(finding.text)} {self._source(finding.source)}"

    def _source(self, files: str) -> str:
        return f"({files})" if self.plain else f"[{files}]{{.source}}"

    def limits(self) -> Markdown:
        """Return what limits the findings, as a list."""
        first = [f.Finding(str(self.scope), "model.json")]
        found = [*first, *self._topic("chance"), *self._topic("power"), *self._topic("binding")]
        about_bh = (
            "- What BH controls is the proportion of chosen experts that the null calls unneeded. "
            "That is not the share whose removal would leave the prediction unchanged; only an "
            "intervention could tell."
        )
        about_line = (
            "- Interpolation between static settings stands for a random mixture of them; where "
            "loss is convex in the number of experts it favours the strategy compared with it."
        )
        fixed = [about_bh] * has_bh(self.study)
        fixed += [about_line] * (not self.study.statistics["matched_compute"].empty)
        return Markdown("\n".join([*map(self._bullet, found), *fixed]))

    def _topic(self, name: str) -> list[f.Finding]:
        if name not in self._sentences:
            raise InputError(f"finding '{name}'; allowed: {', '.join(self._sentences)}")
        return self._sentences[name]

    def source(self, name: str) -> Markdown:
        """Return the file that a topic's numbers stand in."""
        return Markdown(w.code(list(dict.fromkeys(x.source for x in self._topic(name)))))

    # Tables and figures.

    def table(self, label: str) -> Markdown:
        """Return a table with its caption and label; why not, if this run has none.

        Raises:
            InputError: there is no such table.
        """
        sheet = self._sheet(label)
        if not sheet.ready(self.study):
            return Markdown(f"*Not made: {sheet.needs}.*")
        table, caption = sheet.build(self.study), sheet.caption(self.study)
        body = tables.markdown(table, sheet.align)
        if self.plain:
            return Markdown(f"{body}\n\n*{caption}*\n")
        return Markdown(f"{body}\n\n: {caption} {{#{label}}}\n")

    def _sheet(self, label: str) -> Sheet:
        if label not in SHEETS:
            raise InputError(f"table '{label}'; allowed: {', '.join(SHEETS)}")
        return SHEETS[label]

    def figure(self, label: str) -> Markdown:
        """Return a figure with its caption, alt text and label; why not, if this run has none.

        Raises:
            InputError: there is no such figure, or it should have been drawn and was not.
        """
        picture = self._picture(label)
        path = self.study.folder / picture.path
        if not path.is_file():
            if picture.due(self.study):
                raise InputError(f"{path}: the figure is missing; run the workflow to draw it")
            return Markdown(f"*Not drawn: {picture.needs}.*")
        shown = Path(os.path.relpath(path.resolve(), Path.cwd().resolve())).as_posix()
        caption = f"{picture.caption} From {w.code(picture.sources)}."
        alt = picture.alt.replace('"', "'")
        return Markdown(f'![{caption}]({shown}){{#{label} fig-alt="{alt}" width=100%}}\n')

    def _picture(self, label: str) -> Picture:
        if label not in GALLERY:
            raise InputError(f"figure '{label}'; allowed: {', '.join(GALLERY)}")
        return GALLERY[label]

    def ref(self, label: str, otherwise: str = "not in this run") -> Markdown:
        """Return a cross-reference to a table or figure, or words if this run has none."""
        if label.startswith("tbl-"):
            there = self._sheet(label).ready(self.study)
        else:
            there = (self.study.folder / self._picture(label).path).is_file()
        return Markdown(f"@{label}" if there else otherwise)

    def value(self, strategy: str, dataset: str, column: str = "value") -> Markdown:
        """Return one number of the table of cells, in words."""
        row = self.study.cell(strategy, dataset)
        if column == "value":
            return Markdown(w.estimate(row["value"], row["ci_low"], row["ci_high"], row["metric"]))
        return Markdown(w.experts(float(row[column])))

    def metric(self, dataset: str) -> Markdown:
        """Return the name of a data set's main metric."""
        return Markdown(METRICS[self.study.cell(self.study.baseline, dataset)["metric"]].label)


def _tied(text: str) -> str:
    return _TIES.sub("\N{NO-BREAK SPACE}", text)
