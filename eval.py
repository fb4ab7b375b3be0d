"""Tasks of lm-evaluation-harness, answered by the strategies of this library.

    python eval.py --include_path eval_tasks --tasks python_functions,python_lines --sample False
    python eval.py --tasks gsm8k --generation_strategy self_speculative --exit_layer 8 --num_speculations 6
    python eval.py --tasks hellaswag --exit_layer 12    # what the model is worth at layer 12

Generation settings are the tasks' own, except where a flag is given. Log-likelihoods are the full model's;
with --exit_layer and the autoregressive strategy, those of the early exit. Results go to a folder of
--output_dir.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # for the seconds that the imports take

import difflib
import itertools
import logging
import math
import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator, InitProcessGroupKwargs
from lm_eval import simple_evaluate
from lm_eval.api.task import Task
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table, simple_parse_args_string

from arguments import (
    EvalArguments,
    GenerationConfig,
    ModelArguments,
    TuningArguments,
    given_flags,
    parse,
    refuse,
)
from data import one_line
from measures import metrics
from measures.harness_model import SUPPORTED_GENERATION_KWARGS, HarnessModel, request_config, unsupported
from runs import ranks
from runs.records import Record, RecordError, Run, check_destination, describe, describe_model
from runs.startup import load_generator, meet, model_name, number_of_layers, run
from runs.tuning import tuned

# How the model is driven; every other field of GenerationConfig is a task's to choose.
_DRIVING = {
    "generation_strategy", "exit_layer", "num_speculations",
    "draft_weights", "draft_confidence", "prompt_lookup",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    groups = (ModelArguments, GenerationConfig, EvalArguments, TuningArguments)
    model_args, config, args, tuning = parse(__doc__ or "", *groups, args=argv)
    config = tuned(config, tuning)
    for name in ("use_cache", "cache_requests"):
        if (value := getattr(args, name)) and model_args.parallel == "tensor":
            refuse(
                f"--{name} {value}: not with --parallel tensor, whose ranks could find different things there"
            )
    meet(model_args)
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
    manager, tasks = _load_tasks(args, config, overrides)
    generates = any(task.OUTPUT_TYPE == "generate_until" for task in tasks.values())
    generator = load_generator(model_args, config)
    if args.apply_chat_template and not generator.tokenizer.chat_template:
        refuse("--apply_chat_template True: the model's tokenizer has no chat template")
    accelerator = None
    if ranks.world_size() > 1:
        patience = InitProcessGroupKwargs(timeout=ranks.PATIENCE)
        accelerator = Accelerator(cpu=generator.model.device.type == "cpu", kwargs_handlers=[patience])
    try:
        description |= describe_model(model_name(model_args), generator.model)
        first = ranks.rank() == 0
        _, output_dir = ranks.place_to_write(None, model_args.output_dir)
        run = ranks.share(Run.create(output_dir, "eval", description) if first else None)
        assert run is not None
        if first and overrides and generates:
            given = ", ".join(f"--{name} {getattr(config, name)}" for name in overrides)
            print(f"in place of the tasks' own generation settings: {given}", file=sys.stderr)
        model = HarnessModel(
            generator, config, overrides, args.batch_size, args.torch_random_seed,
            keep=run.writer(ranks.rank()).append, accelerator=accelerator,
        )  # fmt: skip
        tracker = EvaluationTracker(output_path=str(run.folder))
        results = simple_evaluate(
            model,
            model_args={"pretrained": Path(model_name(model_args)).name},
            tasks=list(tasks),
            task_manager=manager,
            evaluation_tracker=tracker,
            device=str(generator.model.device),
            **_passed_on(args, (model_name(model_args), str(generator.model.dtype), config, overrides)),
        )
        for what, number in model.notices.items():
            print(f"{what}: {number}, to fit the model's context", file=sys.stderr)
        ranks.barrier()
        if results is not None:
            _show_and_save(run, tracker, results, args)
    except KeyboardInterrupt:
        kept = "--use_cache PATH would have kept answers to go on from"
        if args.use_cache:
            kept = "the same command goes on with what --use_cache kept: all answers but sampled ones"
        print(f"interrupted; {kept}", file=sys.stderr)
        return 130
    except (RecordError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, AssertionError) as error:  # what the harness says of flags that do not fit a task
        refuse(f"--tasks {','.join(args.tasks)}: {one_line(error)}")
    if accelerator is not None:
        accelerator.end_training()
    ranks.leave()
    return 0


def _load_tasks(
    args: EvalArguments, config: GenerationConfig, overrides: Sequence[str]
) -> tuple[TaskManager, dict[str, Task]]:
    """The harness's manager, and every single task that was asked for, its data read.

    What is wrong with them ends the program in one line with status 2.
    """
    if args.include_path is not None and not Path(args.include_path).is_dir():
        refuse(f"--include_path {args.include_path}: no such folder")
    try:
        given = simple_parse_args_string(args.gen_kwargs) if args.gen_kwargs else {}
    except Exception:  # whatever its parser stumbles over
        refuse(f"--gen_kwargs {args.gen_kwargs}: must be k=v,k=v")
    asked = EvaluatorConfig(tasks=args.tasks, include_path=args.include_path)
    flag = f"--tasks {','.join(args.tasks)}"
    try:
        manager = TaskManager(include_path=args.include_path)
        names = [name for text in args.tasks for name in text.split(",")]
        for name in names:
            if not (name.endswith(".yaml") or Path(name).is_dir() or manager.match_tasks([name])):
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                hint = (
                    f"; near are {', '.join(near)}"
                    if near
                    else f"; {len(manager.all_tasks)} others are known"
                )
                refuse(f"--tasks {name}: no such task{hint}")
        asked.process_tasks()
        if not asked.tasks:
            refuse(f"{flag}: no task in there")
        loaded = manager.load(asked.tasks)
    except Exception as error:  # data sets, hubs and YAML files raise their own
        refuse(f"{flag}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    manager.load = lambda names: loaded  # the harness loads what it is given: once is enough
    for name, task in loaded["tasks"].items():
        generation = {**(task.get_config("generation_kwargs") or {}), **given}
        if wrong := unsupported(generation):
            refuse(
                f"--tasks {name}: asks for {', '.join(f'{k}={v}' for k, v in wrong.items())} in generation; "
                f"supported are max_gen_toks, {', '.join(sorted(SUPPORTED_GENERATION_KWARGS))}"
            )
        try:
            request_config(generation, config, overrides)
        except (ValueError, TypeError) as error:
            refuse(f"--tasks {name}: asks for {error}")
        if getattr(task, "UNSAFE_CODE", False) and not args.confirm_run_unsafe_code:
            refuse(f"--tasks {name}: runs what the model wrote; allow it with --confirm_run_unsafe_code True")
        if getattr(task, "MULTIMODAL", False):
            refuse(f"--tasks {name}: needs a model that sees pictures")
        number = min(get_sample_size(task, args.limit) or math.inf, len(task.eval_docs))
        if number < ranks.world_size():
            refuse(f"--tasks {name}: {number} documents for {ranks.world_size()} ranks")
        _draw_in_step(task)
    return manager, loaded["tasks"]


def _draw_in_step(task: Task) -> None:
    """Few-shot examples are drawn document by document: each rank skips the draws of the others."""
    sample = task.sampler.sample
    skipped = itertools.chain([ranks.rank()], itertools.repeat(ranks.world_size() - 1))

    def sample_in_step(*args: Any, **kwargs: Any) -> Any:
        for _ in range(next(skipped)):
            sample(*args, **kwargs)
        return sample(*args, **kwargs)

    task.sampler.sample = sample_in_step


def _passed_on(args: EvalArguments, answers_depend_on: tuple[Any, ...]) -> dict[str, Any]:
    """What `simple_evaluate` takes as it was given; kept answers are for the same model and settings only."""
    own = {"tasks", "include_path", "cache_requests", "use_cache"}
    key = zlib.crc32(repr((*answers_depend_on, args.torch_random_seed)).encode())
    return {
        **{field.name: getattr(args, field.name) for field in fields(args) if field.name not in own},
        "use_cache": f"{args.use_cache}_{key:08x}" if args.use_cache else None,
        "cache_requests": args.cache_requests in ("true", "refresh"),
        "rewrite_requests_cache": args.cache_requests == "refresh",
        "delete_requests_cache": args.cache_requests == "delete",
    }


def _show_and_save(
    run: Run, tracker: EvaluationTracker, results: dict[str, Any], args: EvalArguments
) -> None:
    """The harness's files and table, and ours: how fast each task was."""
    samples = results.pop("samples", {})
    tracker.save_results_aggregated(results, samples if args.log_samples else None)
    for name, said in samples.items():
        tracker.save_results_samples(name, said)
    for kind in ("results", *(f"samples_{name}" for name in samples)):
        if not list(run.folder.glob(f"*/{kind}_*.json*")):  # the harness does not raise
            raise RecordError(f"cannot write {kind} into {run.folder}")
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
    run.finish(records, {"tasks": speed})
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
    run(main)
