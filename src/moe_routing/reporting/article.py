"""What the article's cells call: every number, sentence, table and figure from result files.

A cell ends in one of these calls; its value is Markdown. Inline code uses the same values. So the
same source renders by Quarto, in the preview and in a notebook.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from moe_routing import wording
from moe_routing.analysis.tables import markdown
from moe_routing.config.study import config_file
from moe_routing.errors import InputError
from moe_routing.reporting import tables
from moe_routing.reporting.article_figures import ARTICLE_FIGURES, DRAWN_BY
from moe_routing.reporting.article_tables import ARTICLE_TABLES
from moe_routing.reporting.claims import Finding
from moe_routing.reporting.findings import WEIGHTS
from moe_routing.reporting.names import in_words
from moe_routing.reporting.pages import FIGURES, MODEL_FILE, VARIABLE, collected
from moe_routing.reporting.plan import findings_on
from moe_routing.reporting.protocol import PROSE, has_bh, needed, nulls
from moe_routing.reporting.results import StudyResults
from moe_routing.routing.strategies import family_entry
from moe_routing.vocabulary import DATASETS

DEFAULT = Path("results") / "default"
DEFAULT_CONFIG = "config/config.yaml"
"""The config file that the workflow reads if none is given."""

DOWNLOADED = 200_000
"""Largest table in bytes that the article carries in itself."""

_CSV = re.compile(r"`([\w/]+\.csv)`")
_UNBREAKABLE = re.compile(
    r"(?<=\d) (?=%|\u00d7 10)|(?<=\d \u00d7) (?=10)"
    r"|(?<=\b[pnk]) (?=[<=>])|(?<=\b[pnk] [<=>]) (?=\d)"
)
"""Spaces at which no line may break: 95 %, n = 200, p < 0.001, before and after a times sign."""

_ABOUT_LEVERS = (
    "- Norms, mean outputs, constants of layers, budgets and scales are fitted on calibration "
    "text. On text of another kind, a budget keeps another number of experts, and a certificate "
    "promises nothing. How much each lever gives depends on the model.\n"
    "- The rule of lowest loss was chosen from these results, which favours it on the set that "
    "chose it. The other sets show whether the choice carries over."
)

Entry = TypeVar("Entry")


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
    setting = f"{VARIABLE}={named}" if named else f"{VARIABLE} is not set"
    raise InputError(f"{setting}: no config.yaml in {wanted}, here ({here}) or in a folder above")


@dataclass(frozen=True)
class Article:
    """A study as the article shows it.

    Attributes:
        study: the results that are shown.
        notebook: leave out pandoc's labels and classes, which a notebook would show verbatim.
    """

    study: StudyResults
    notebook: bool = False

    @classmethod
    def load(cls, folder: Path | str | None = None, *, notebook: bool = False) -> Article:
        """Read the results folder; see :func:`results_folder`."""
        return cls(StudyResults.load(folder or results_folder()), notebook)

    # Names and small numbers for running text.

    @property
    def model(self) -> Markdown:
        """The model as the text names it."""
        return Markdown(self.study.model.phrase)

    @property
    def name(self) -> Markdown:
        """The model's name."""
        return Markdown(self.study.model.name)

    @property
    def date(self) -> Markdown:
        """The day on which the results were collected."""
        return Markdown(collected(self.study.folder))

    @property
    def topology(self) -> Markdown:
        """The model's layers, experts and top k."""
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
            wording.listed([f"{DATASETS[name].label} {DATASETS[name].citation}" for name in names])
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
            wording.listed(
                [
                    f"{DATASETS[name].label} "
                    f"({wording.count(study.cell(study.baseline, name)['n_items'])} items)"
                    for name in tables.datasets_by_task(study)
                ]
            )
        )

    @property
    def baseline(self) -> Markdown:
        """The baseline strategy."""
        return Markdown(f"`{self.study.baseline}`")

    @property
    def own_weights(self) -> Markdown:
        """How the model itself weights experts."""
        return Markdown(WEIGHTS[self.study.model.rule.weighting])

    @property
    def primary_contrast(self) -> Markdown:
        """The contrasts declared before the run, in their order."""
        weighting = self.study.model.rule.weighting
        against: dict[str, list[str]] = {}
        for one in self.study.config.statistics.contrasts:
            where = f"{in_words(str(one.against), weighting)}, on {DATASETS[one.dataset].label}"
            against.setdefault(where, []).append(in_words(one.strategy, weighting))
        parts = [f"{', then '.join(names)}, against {where}" for where, names in against.items()]
        return Markdown("; then ".join(parts))

    @property
    def main_metrics(self) -> Markdown:
        """The main metric of each set."""
        sets: dict[str, list[str]] = {}
        for name, metric in self.study.main_measures.items():
            sets.setdefault(wording.measure_words(metric), []).append(DATASETS[name].label)
        parts = [f"{noun} on {wording.listed(names)}" for noun, names in sets.items()]
        return Markdown(", and ".join(parts))

    @property
    def margins(self) -> Markdown:
        """The non-inferiority margins."""
        settings = self.study.config.statistics
        return Markdown(
            f"{wording.magnitude(settings.margin_accuracy, 'accuracy')} of accuracy and "
            f"{wording.magnitude(settings.margin_nats, 'nats_per_token')}"
        )

    @property
    def confidence(self) -> Markdown:
        """The level of intervals."""
        return Markdown(wording.percent(self.study.config.statistics.confidence, 0))

    @property
    def families(self) -> Markdown:
        """The families that were run, in words."""
        words = [family_entry(name).words for name in self.study.families]
        return Markdown(wording.listed(words))

    @property
    def strategies(self) -> Markdown:
        """The number of strategies that have cells."""
        return Markdown(wording.count(self.study.cells["strategy"].nunique()))

    @property
    def resamples(self) -> Markdown:
        """The number of bootstrap resamples."""
        return Markdown(wording.count(self.study.config.statistics.resamples))

    def text(self, name: str) -> Markdown:
        """Return a passage that depends on what the study has.

        Raises:
            InputError: there is no such text.
        """
        if name not in PROSE:
            raise InputError(f"text '{name}'; allowed: {', '.join(PROSE)}")
        return Markdown(_nonbreaking(PROSE[name](self.study)))

    # Sentences.

    def say(self, topics: str, otherwise: str = "") -> Markdown:
        """Return the findings on topics as running text, with the files of their numbers.

        Several topics are separated by spaces; each file is named once.

        Raises:
            InputError: there is no such topic.
        """
        found = findings_on(self.study, topics.split())
        if not found:
            return Markdown(otherwise)
        sources = ", ".join(dict.fromkeys(finding.source for finding in found))
        return Markdown(f"{self.plain(topics)} {self._source(sources)}")

    def plain(self, topics: str) -> Markdown:
        """Return the findings on topics as running text, without the files of their numbers.

        Raises:
            InputError: there is no such topic.
        """
        found = findings_on(self.study, topics.split())
        return Markdown(_nonbreaking(" ".join(finding.text for finding in found)))

    def listing(self, topic: str, otherwise: str = "Nothing.") -> Markdown:
        """Return the findings on a topic as a list, each with the file of its numbers.

        Raises:
            InputError: there is no such topic.
        """
        lines = map(self._bullet, findings_on(self.study, [topic]))
        return Markdown("\n".join(lines) or otherwise)

    def _bullet(self, finding: Finding) -> str:
        return f"- {_nonbreaking(finding.text)} {self._source(finding.source)}"

    def _source(self, files: str) -> str:
        return f"({files})" if self.notebook else f"[{files}]{{.source}}"

    def limits(self) -> Markdown:
        """Return what limits the findings, as a list."""
        found = [
            Finding(str(self.scope), MODEL_FILE),
            *findings_on(self.study, ["chance", "binding", "scale"]),
        ]
        about_line = (
            "- Interpolation between static settings stands for a random mixture of them. Where "
            "loss is convex in the number of experts, it favours the strategy compared with it."
        )
        fixed = _about_bh(nulls(self.study)) if has_bh(self.study) else []
        fixed += [about_line] * (not self.study.statistics["matched_compute"].empty)
        fixed += [_ABOUT_LEVERS] * (not self.study.budgets.empty)
        return Markdown("\n".join([*map(self._bullet, found), *fixed]))

    # Tables and figures.

    def table(self, label: str) -> Markdown:
        """Return a table with its caption and label, or why this run has none.

        Raises:
            InputError: there is no such table.
        """
        table = _entry(ARTICLE_TABLES, label, "table")
        if not table.ready(self.study):
            return Markdown(f"*Not made: {table.needs}.*")
        body, caption = markdown(table.build(self.study), table.align), table.caption(self.study)
        if self.notebook:
            return Markdown(f"{body}\n\n*{caption}*\n")
        return Markdown(f"{body}\n\n: {caption} {{#{label}}}\n{self._downloads(caption)}")

    def _downloads(self, caption: str) -> str:
        """Return links to the tables that a caption names, in HTML only.

        The page is one file that may be sent without the results, so it carries the tables itself.
        """
        links = []
        for name in dict.fromkeys(_CSV.findall(caption)):
            path = self.study.folder / name
            if path.is_file() and path.stat().st_size <= DOWNLOADED:
                data = base64.b64encode(path.read_bytes()).decode("ascii")
                address = f"data:text/csv;base64,{data}"
                links.append(f'<a download="{path.name}" href="{address}">{path.name}</a>')
        if not links:
            return ""
        return f'\n```{{=html}}\n<p class="download">Download: {", ".join(links)}</p>\n```\n'

    def figure(self, label: str) -> Markdown:
        """Return a figure with its caption, alt text and label, or why this run has none.

        Raises:
            InputError: there is no such figure, or it should have been drawn and was not.
        """
        figure = _entry(ARTICLE_FIGURES, label, "figure")
        path = self.study.folder / figure.path
        if not path.is_file():
            if figure.due(self.study.config, self.study.folder):
                raise InputError(f"{path}: the figure is missing; run the workflow to draw it")
            return Markdown(f"*Not drawn: {figure.needs}.*")
        shown = Path(FIGURES) / f"{label}.png"
        shown.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, shown)
        caption = f"{figure.caption} From {wording.code(figure.sources)}."
        if label in DRAWN_BY:
            caption += f" [Notebook](notebooks/{DRAWN_BY[label]}.html)."
        alt = figure.alt.replace('"', "'")
        return Markdown(f'![{caption}]({shown}){{#{label} fig-alt="{alt}" width=100%}}\n')

    def ref(self, label: str, otherwise: str = "not in this run") -> Markdown:
        """Return a cross-reference to a table or figure, or words if this run has none.

        Raises:
            InputError: there is no such table or figure.
        """
        if label.startswith("tbl-"):
            there = _entry(ARTICLE_TABLES, label, "table").ready(self.study)
        else:
            path = _entry(ARTICLE_FIGURES, label, "figure").path
            there = (self.study.folder / path).is_file()
        return Markdown(f"@{label}" if there else otherwise)


def _about_bh(names: Sequence[str]) -> list[str]:
    """Return what the error control of BH does not cover under its nulls."""
    toggled = needed(names)
    logits = [name for name in names if name not in toggled]
    lines = []
    if toggled:
        lines.append(
            f"- Under {wording.code(toggled)}, BH controls waste: experts that are kept although "
            "toggling each alone would hardly change the prediction. It does not limit the damage "
            "of dropping the others, which are dropped together. For an expert that the model had "
            "not chosen, a discovery says that adding it changes the prediction, not that it is "
            "better."
        )
    if logits:
        lines.append(
            f"- Under {wording.code(logits)}, BH controls the proportion of chosen experts for "
            "which the null holds. This is not the proportion whose removal would leave the "
            "prediction unchanged, which the ablation measures."
        )
    return lines


def _entry(registry: Mapping[str, Entry], label: str, kind: str) -> Entry:
    if label not in registry:
        raise InputError(f"{kind} '{label}'; allowed: {', '.join(registry)}")
    return registry[label]


def _nonbreaking(text: str) -> str:
    return _UNBREAKABLE.sub("\N{NO-BREAK SPACE}", text)
