"""The tasks of lm-evaluation-harness that --tasks names, found, read and checked before the model is loaded.

Whatever is wrong with them ends the program in one line with status 2.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.task import Task
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.evaluator_utils import find_test_root, get_sample_size
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string

from arguments import EvalArguments, GenerationConfig, refuse
from measures.harness_model import SUPPORTED_GENERATION_KWARGS, request_config, unsupported
from runs import ranks


def load_tasks(
    args: EvalArguments, config: GenerationConfig, overrides: Collection[str]
) -> tuple[TaskManager, dict[str, Task]]:
    """The harness's manager, and by name every single task that was asked for, its data read.

    Args:
        overrides: fields of `config` that count in place of the tasks' own.
    """
    try:
        given = simple_parse_args_string(args.gen_kwargs) if args.gen_kwargs else {}
    except Exception:  # its parser raises all kinds
        refuse(f"--gen_kwargs {args.gen_kwargs}: must be k=v,k=v")
    if args.check_integrity:
        _find_the_harness_tests()
    manager, tasks = _find(args)
    for name, task in tasks.items():
        _check_generation(name, {**(task.get_config("generation_kwargs") or {}), **given}, config, overrides)
        if getattr(task, "UNSAFE_CODE", False) and not args.confirm_run_unsafe_code:
            refuse(f"--tasks {name}: runs what the model wrote; allow it with --confirm_run_unsafe_code True")
        if getattr(task, "MULTIMODAL", False):
            refuse(f"--tasks {name}: needs a model that sees pictures")
        number = min(get_sample_size(task, args.limit) or math.inf, len(task.eval_docs))
        if number < ranks.world_size():
            refuse(f"--tasks {name}: {number} documents for {ranks.world_size()} ranks")
        _draw_in_step(task)
    return manager, tasks


def _find(args: EvalArguments) -> tuple[TaskManager, dict[str, Task]]:
    flag = f"--tasks {','.join(args.tasks)}"
    asked = EvaluatorConfig(tasks=args.tasks, include_path=args.include_path)
    try:
        manager = TaskManager(include_path=args.include_path)
        for name in (name for text in args.tasks for name in text.split(",")):
            if not (name.endswith(".yaml") or Path(name).is_dir() or manager.match_tasks([name])):
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                known = (
                    f"near are {', '.join(near)}" if near else f"{len(manager.all_tasks)} others are known"
                )
                refuse(f"--tasks {name}: no such task; {known}")
        asked.process_tasks()
        if not asked.tasks:
            refuse(f"{flag}: no task in there")
        loaded = manager.load(asked.tasks)
    except Exception as error:  # data sets, hubs and YAML files raise their own
        refuse(f"{flag}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    manager.load = lambda names: loaded  # the harness would load them again, data and all
    return manager, loaded["tasks"]


def _find_the_harness_tests() -> None:
    try:
        find_test_root(Path(lm_eval.__file__))
    except FileNotFoundError:
        refuse("--check_integrity True: needs lm-eval from its sources, a wheel leaves its tests out")


def _check_generation(
    name: str, generation: dict[str, Any], config: GenerationConfig, overrides: Collection[str]
) -> None:
    """Refuse generation arguments that cannot be honoured, or that are out of range."""
    if wrong := unsupported(generation):
        refuse(
            f"--tasks {name}: asks for {', '.join(f'{k}={v}' for k, v in wrong.items())} in generation; "
            f"supported are max_gen_toks, {', '.join(sorted(SUPPORTED_GENERATION_KWARGS))}"
        )
    try:
        request_config(generation, config, overrides)
    except (ValueError, TypeError) as error:
        refuse(f"--tasks {name}: asks for {error}")


def _draw_in_step(task: Task) -> None:
    """Draw few-shot examples as one process would, which draws for document after document.

    Documents are dealt to ranks in turn: before its own draws, each rank makes those of the documents that
    the others have.
    """
    sample = task.sampler.sample
    skipped = itertools.chain([ranks.rank()], itertools.repeat(ranks.world_size() - 1))

    def sample_in_step(*args: Any, **kwargs: Any) -> Any:
        for _ in range(next(skipped)):
            sample(*args, **kwargs)
        return sample(*args, **kwargs)

    task.sampler.sample = sample_in_step
