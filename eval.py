"""Tasks of lm-evaluation-harness, answered by the strategies of this library.

    python eval.py --include_path eval_tasks --tasks python_functions,python_lines --sample False
    python eval.py --tasks gsm8k --generation_strategy self_speculative --exit_layer 8 --num_speculations 6
    python eval.py --tasks hellaswag --exit_layer 12    # what the model is worth at layer 12

Generation settings are the tasks' own, except where a flag is given. Log-likelihoods are the full model's;
with --exit_layer and the autoregressive strategy, those of the early exit. Results go to a folder of
--output_dir.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from lm_eval import simple_evaluate
from lm_eval.api.task import Task
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table, simple_parse_args_string

import distributed
import metrics
from arguments import (
    EvalArguments,
    GenerationConfig,
    ModelArguments,
    TuningArguments,
    given_flags,
    parse,
    refuse,
)
from harness_model import SUPPORTED_GENERATION_KWARGS, HarnessModel, unsupported
from records import Record, RecordError, Run, check_destination, describe, describe_model
from startup import load_generator, model_name, number_of_layers
from tuning import tuned

# How the model is driven; every other field of GenerationConfig is a task's to choose.
_DRIVING = {"generation_strategy", "exit_layer", "num_speculations"}


def main(argv: Sequence[str] | None = None) -> int:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    groups = (ModelArguments, GenerationConfig, EvalArguments, TuningArguments)
    model_args, config, args, tuning = parse(__doc__ or "", *groups, args=argv)
    config = tuned(config, tuning)
    overrides = sorted(given_flags(argv, GenerationConfig) - _DRIVING)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        config.check_depth(number_of_layers(model_args))
        description = describe("eval", (model_args, config, args), "")
        check_destination(None, model_args.output_dir, description)
    except ValueError as error:
        refuse(f"--{error}")
    except RecordError as error:
        refuse(str(error))
    manager, tasks = _load_tasks(args)
    generator = load_generator(model_args, config)
    if args.apply_chat_template and not generator.tokenizer.chat_template:
        refuse("--apply_chat_template True: the model's tokenizer has no chat template")
    accelerator = None
    if distributed.world_size() > 1:
        accelerator = Accelerator(cpu=generator.model.device.type == "cpu")
    try:
        description |= describe_model(model_name(model_args), generator.model)
        first = distributed.rank() == 0
        run = distributed.share(Run.create(model_args.output_dir, "eval", description) if first else None)
        assert run is not None
        if first and overrides and any(task.OUTPUT_TYPE == "generate_until" for task in _leaves(tasks)):
            given = ", ".join(f"--{name} {getattr(config, name)}" for name in overrides)
            print(f"in place of the tasks' own generation settings: {given}", file=sys.stderr)
        model = HarnessModel(
            generator, config, overrides, args.batch_size, args.torch_random_seed,
            keep=run.writer(distributed.rank()).append, accelerator=accelerator,
        )  # fmt: skip
        tracker = EvaluationTracker(output_path=str(run.folder))
        results = simple_evaluate(
            model,
            model_args={"pretrained": Path(model_name(model_args)).name},
            tasks=tasks,
            task_manager=manager,
            evaluation_tracker=tracker,
            device=str(generator.model.device),
            **_passed_on(args),
        )
        distributed.barrier()
        if results is not None:
            _show_and_save(run, tracker, results, args)
    except KeyboardInterrupt:
        again = (
            "the same command goes on where it stopped"
            if args.use_cache
            else "nothing but --use_cache PATH keeps them"
        )
        print(f"interrupted; {again}", file=sys.stderr)
        return 130
    except RecordError as error:
        print(error, file=sys.stderr)
        return 1
    if accelerator is not None:
        accelerator.end_training()
    return 0


def _load_tasks(args: EvalArguments) -> tuple[TaskManager, list[Any]]:
    """The harness's manager, and the tasks and groups that were asked for, their data read.

    What is wrong with them ends the program in one line with status 2.
    """
    if args.include_path is not None and not Path(args.include_path).is_dir():
        refuse(f"--include_path {args.include_path}: no such folder")
    asked = EvaluatorConfig(tasks=args.tasks, include_path=args.include_path)
    try:
        manager = asked.process_tasks()
    except ValueError:
        manager = TaskManager(include_path=args.include_path)
        names = [name for text in args.tasks for name in text.split(",")]
        unknown = next(name for name in names if not manager.match_tasks([name]))
        near = difflib.get_close_matches(unknown, manager.all_tasks, n=3)
        hint = f"; near are {', '.join(near)}" if near else f"; there are {len(manager.all_tasks)} others"
        refuse(f"--tasks {unknown}: no such task{hint}")
    try:
        given = simple_parse_args_string(args.gen_kwargs) if args.gen_kwargs else {}
    except Exception:  # whatever its parser stumbles over
        refuse(f"--gen_kwargs {args.gen_kwargs}: must be k=v,k=v")
    try:
        loaded = manager.load(asked.tasks)
    except Exception as error:  # data sets, hubs and YAML files raise their own
        refuse(
            f"--tasks {','.join(args.tasks)}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )
    for name, task in loaded["tasks"].items():
        if wrong := unsupported({**(task.get_config("generation_kwargs") or {}), **given}):
            refuse(
                f"--tasks {name}: asks for {', '.join(f'{k}={v}' for k, v in wrong.items())} in generation; "
                f"supported are max_gen_toks, {', '.join(sorted(SUPPORTED_GENERATION_KWARGS))}"
            )
        if getattr(task, "UNSAFE_CODE", False) and not args.confirm_run_unsafe_code:
            refuse(f"--tasks {name}: runs what the model wrote; allow it with --confirm_run_unsafe_code True")
    grouped = {id(task) for group in loaded["groups"].values() for task in group.get_all_tasks()}
    inner = {id(child) for group in loaded["groups"].values() for child in group.get_all_groups()}
    outer = [group for group in loaded["groups"].values() if id(group) not in inner]
    return manager, [*outer, *(task for task in loaded["tasks"].values() if id(task) not in grouped)]


def _leaves(tasks: list[Any]) -> list[Task]:
    return [leaf for task in tasks for leaf in ([task] if isinstance(task, Task) else task.get_all_tasks())]


def _passed_on(args: EvalArguments) -> dict[str, Any]:
    """What `simple_evaluate` takes as it was given."""
    own = {"tasks", "include_path", "cache_requests"}
    return {
        **{field.name: getattr(args, field.name) for field in fields(args) if field.name not in own},
        "cache_requests": args.cache_requests in ("true", "refresh"),
        "rewrite_requests_cache": args.cache_requests == "refresh",
        "delete_requests_cache": args.cache_requests == "delete",
    }


def _show_and_save(
    run: Run, tracker: EvaluationTracker, results: dict[str, Any], args: EvalArguments
) -> None:
    """The harness's files and table, and ours: how fast each task was."""
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples if args.log_samples else None)
    if args.log_samples or args.predict_only:
        for name in results["configs"]:
            tracker.save_results_samples(name, samples[name])
    if not list(run.folder.glob("*/results_*.json")):
        raise RecordError(f"cannot write the results into {run.folder}")
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    records = [record for _, record in sorted(run.records().items())]
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record)
    speed = {
        task: {
            "speed": metrics.speed(own),
            **({"acceptance": metrics.acceptance(own)} if "num_verifications" in own[0] else {}),
        }
        for task, own in by_task.items()
    }
    run.finish(records, {"tasks": speed, "results": results["results"]})
    for task, figures in speed.items():
        line = f"{task}: {len(by_task[task])} answers, {figures['speed']['tokens_per_second']:.1f} tokens/s"
        if accepted := figures.get("acceptance"):
            line += (
                f", acceptance rate {accepted['acceptance_rate'] or 0:.1%}, mean accepted length "
                f"{accepted['mean_accepted_length'] or 1:.2f}"
            )
        print(line)
    print(f"\n{run.folder}/: run.json, records.jsonl, and the harness's results and samples")


if __name__ == "__main__":
    sys.exit(main())
