"""Compare what lm-evaluation-harness logged in several runs."""

from __future__ import annotations

from collections.abc import Sequence

from moe_routing.commands.differences import difference_section, differences, explanation
from moe_routing.commands.receipt import Receipt
from moe_routing.commands.samples import named_files, read_samples, sample_panels, task_of
from moe_routing.config.study import StatisticsConfig
from moe_routing.evaluation.record import environment
from moe_routing.files import sha256_of
from moe_routing.schema import parse


def receipt_of_files(files: Sequence[str], seed: int) -> Receipt:
    """Compare files of samples with the first of them.

    Args:
        files: ``LABEL=FILE`` or ``FILE``, of the same task.
        seed: seed of the resamples.

    Raises:
        InputError: see :mod:`moe_routing.commands.samples`.
    """
    named = named_files(files)
    task = task_of(next(iter(named.values())))
    panels = sample_panels(task, {label: read_samples(path) for label, path in named.items()})
    baseline, first, *_ = named
    primary = {"strategy": first, "dataset": task}
    settings = parse(
        StatisticsConfig, {"baseline": baseline, "primary": primary}, "command line: --samples"
    )
    found = differences(panels, settings, seed)
    summary = (
        f"{panels[0].n_items:,} documents of `{task}`, answered in {len(named)} runs of "
        "lm-evaluation-harness. Documents count as independent of each other.",
        explanation(settings),
    )
    record = {
        "task": task,
        "files": {
            label: {"path": str(path), "sha256": sha256_of(path)} for label, path in named.items()
        },
        "settings": settings.model_dump(mode="json"),
        **found.record,
        "environment": environment(seed, 1),
    }
    sections = [difference_section(found, task, settings)]
    return Receipt(f"{', '.join(named)}: {task}", summary, sections, record)
