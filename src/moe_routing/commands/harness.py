"""Run tasks of lm-evaluation-harness under several strategies of one loaded model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_routing.commands.samples import Sample
from moe_routing.errors import InputError

if TYPE_CHECKING:
    from moe_routing.engine.loading import LoadedModel
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.strategies import Strategy


def harness_samples(
    tasks: Sequence[str],
    strategies: Mapping[str, Strategy],
    loaded: LoadedModel,
    calibration: Calibration | None,
    arguments: argparse.Namespace,
) -> dict[str, dict[str, Sequence[Sample]]]:
    """Return what the harness logs for each document, by task and strategy.

    Args:
        tasks: names of tasks or groups.
        strategies: by id.
        loaded: the model.
        calibration: for the strategies that need one.
        arguments: the command line.

    Raises:
        InputError: the harness is not installed, or does not know or cannot load a task.
    """
    try:
        from lm_eval import simple_evaluate

        from moe_routing.lm_eval_plugin import RoutedLM
    except ImportError as error:
        raise InputError(
            f"--tasks has '{tasks[0]}', a task of lm-evaluation-harness, which is not installed: "
            f"{error}; allowed without it: the sets of this package"
        ) from error
    plug_in: Any = RoutedLM  # the harness's decorator is untyped
    manager = known_tasks(tasks, arguments.include_path)
    found: dict[str, dict[str, Sequence[Sample]]] = {}
    for name in strategies:
        lm = plug_in(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            strategy=name,
            calibration=calibration if strategies[name].uses_calibration else None,
            token_budget=arguments.token_budget,
            max_length=arguments.window,
        )
        results = _evaluate(simple_evaluate, lm, tasks, manager, arguments)
        for task, samples in results["samples"].items():
            found.setdefault(task, {})[name] = samples
    return found


def known_tasks(tasks: Sequence[str], include_path: str | None) -> Any:  # noqa: ANN401
    """Return the harness's task manager.

    Raises:
        InputError: it does not know a task.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(
            f"--tasks has '{unknown[0]}'; allowed: the sets of this package, and tasks that "
            "`lm_eval ls tasks` lists"
        )
    return manager


def _evaluate(
    evaluate: Any,  # noqa: ANN401 (the harness's function)
    lm: object,
    tasks: Sequence[str],
    manager: object,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    try:
        return evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=manager,
            limit=arguments.limit,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=arguments.seed,
            numpy_random_seed=arguments.seed,
            torch_random_seed=arguments.seed,
            fewshot_random_seed=arguments.seed,
        )
    except InputError:
        raise
    # A missing data set, a broken task file: whatever the harness and its libraries raise.
    except (OSError, ValueError, KeyError, ConnectionError, RuntimeError) as error:
        raise InputError(
            f"--tasks {' '.join(tasks)}: {type(error).__name__}: {str(error)[:240]}"
        ) from error
