"""Tasks of lm-evaluation-harness, answered by the strategies of this library.

    python eval.py --include_path eval_tasks --tasks python_functions,python_lines --sample False
    python eval.py --tasks gsm8k --generation_strategy self_speculative --exit_layer 8 --num_speculations 6
    python eval.py --tasks hellaswag --exit_layer 12    # the early exit at layer 12 alone

Generation settings are the tasks' own, except where a flag is given. Log-likelihoods are the full model's;
with --exit_layer and the autoregressive strategy, those of the early exit. Results go to a folder of
--output_dir.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from arguments import (
    EvalArguments,
    GenerationConfig,
    ModelArguments,
    given_flags,
    parse,
    refuse,
    refuse_idle_drafts,
)
from runs.tuning import TuningArguments, tuned

Flags = tuple[ModelArguments, GenerationConfig, EvalArguments, TuningArguments]


def flags(argv: Sequence[str] | None = None) -> Flags:
    """The command line; a mistake that can be seen without model and harness ends the program."""
    groups = (ModelArguments, GenerationConfig, EvalArguments, TuningArguments)
    model_args, config, args, tuning = parse(__doc__ or "", *groups, args=argv)
    for name, value in (("use_cache", args.use_cache), ("cache_requests", args.requests_cache)):
        if value and model_args.parallel == "tensor":
            refuse(
                f"--{name} {value}: not with --parallel tensor, whose ranks could find different things there"
            )
    if args.include_path is not None and not Path(args.include_path).is_dir():
        refuse(f"--include_path {args.include_path}: no such folder")
    config = tuned(config, tuning, argv)
    refuse_idle_drafts(config)
    return model_args, config, args, tuning


if __name__ == "__main__":  # before the imports below, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    flags()

import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import datasets
import lm_eval.evaluator
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import make_table, setup_logging

from data import one_line
from measures import metrics
from measures.harness_model import HarnessModel
from measures.harness_tasks import load_tasks
from runs import ranks
from runs.failures import KINDS, Failed, reason
from runs.program import run
from runs.records import Record, RecordError, Run, check_destination, describe, describe_model
from runs.startup import know_what_was_written, load_generator, meet, model_name, read_config
from self_speculation.drafts.table import driving_flags
from self_speculation.model.prepared import prepared


def main(argv: Sequence[str] | None = None) -> int:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model_args, config, args, tuning = flags(argv)
    # How drafts are made is not for tasks to say; every other setting is, unless a flag is given.
    overrides = sorted(given_flags(argv, GenerationConfig) - set(driving_flags()))
    meet(model_args)
    setup_logging(args.logged)
    _hush_git()
    datasets.disable_progress_bars()
    model_config = read_config(model_args)
    description = describe("eval", (model_args, config, args), "")
    _check(config, model_config.num_hidden_layers, model_args.output_dir, description)
    manager, tasks = load_tasks(args, config, overrides)
    generator = load_generator(model_args, config, model_config)
    know_what_was_written(generator, tuning)
    prepared(generator.model).vocabulary.learns = False  # an answer must not depend on those before it
    if args.apply_chat_template and not generator.tokenizer.chat_template:
        refuse("--apply_chat_template True: the model's tokenizer has no chat template")
    accelerator = _accelerator(generator.model.device)
    try:
        run = _new_run(model_args, description | describe_model(model_name(model_args), generator.model))
        if any(task.OUTPUT_TYPE == "generate_until" for task in tasks.values()):
            _tell(overrides, config)
        model = HarnessModel(
            generator, config, overrides, args.batch_size, args.generation_batch_size,
            args.torch_random_seed, keep=run.writer(ranks.rank()).append, accelerator=accelerator,
        )  # fmt: skip
        tracker = EvaluationTracker(output_path=str(run.folder))
        settings = (model_name(model_args), str(generator.model.dtype), config, overrides)
        results = simple_evaluate(
            model,
            model_args={"pretrained": Path(model_name(model_args)).name},
            tasks=list(tasks),
            task_manager=manager,
            evaluation_tracker=tracker,
            device=str(generator.model.device),
            **_passed_on(args, settings),
        )
        for what, number in model.notices.items():
            print(f"{what}: {number}, to fit the model's context", file=sys.stderr)
        ranks.barrier()
        if results is not None:  # at rank 0
            _save(run, tracker, results, args)
            _show(run, results, args)
    except KeyboardInterrupt:
        print(f"interrupted; {_kept(args)}", file=sys.stderr)
        return 130
    except (RecordError, Failed) as error:
        print(f"{error}; {_kept(args)}", file=sys.stderr)
        return 1
    except KINDS as error:
        if (why := reason(error)) is None:
            raise
        print(f"{why}, a smaller --batch_size; {_kept(args)}", file=sys.stderr)
        return 1
    except (ValueError, AssertionError) as error:  # what the harness says of flags that do not fit a task
        refuse(f"--tasks {','.join(args.tasks)}: {one_line(error)}")
    if accelerator is not None:
        accelerator.end_training()
    return 0


def _check(config: GenerationConfig, num_layers: int, output_dir: str, description: Record) -> None:
    """Refuse an exit that the model does not have, and a folder that cannot be written."""
    try:
        config.check_depth(num_layers)
        check_destination(None, output_dir, description)
    except ValueError as error:
        refuse(f"--{error}")
    except RecordError as error:
        refuse(str(error))


def _hush_git() -> None:
    """The harness asks git for a version, whose complaint where there is no repository would be shown."""
    if shutil.which("git") and subprocess.run(["git", "rev-parse"], capture_output=True).returncode:
        lm_eval.evaluator.get_git_commit_hash = lambda: None


def _kept(args: EvalArguments) -> str:
    """What there is to go on from."""
    if args.use_cache:
        return "the same command goes on with what --use_cache kept: all answers but sampled ones"
    return "--use_cache PATH would have kept answers to go on from"


def _tell(overrides: Sequence[str], config: GenerationConfig) -> None:
    """Say at rank 0 which flags replace settings of the tasks."""
    if overrides and ranks.rank() == 0:
        given = ", ".join(f"--{field} {getattr(config, field)}" for field in overrides)
        print(f"in place of the tasks' own generation settings: {given}", file=sys.stderr)


def _accelerator(device: torch.device) -> Accelerator | None:
    """What the harness exchanges results by, where there are several ranks."""
    if ranks.world_size() == 1:
        return None
    patience = InitProcessGroupKwargs(timeout=ranks.PATIENCE)
    return Accelerator(cpu=device.type == "cpu", kwargs_handlers=[patience])


def _new_run(model_args: ModelArguments, description: Record) -> Run:
    _, output_dir = ranks.place_to_write(None, model_args.output_dir)
    run = ranks.share(Run.create(output_dir, "eval", description) if ranks.rank() == 0 else None)
    assert run is not None
    return run


def _passed_on(args: EvalArguments, settings: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments of `simple_evaluate`; answers are kept apart by the settings that they depend on."""
    own = {"tasks", "include_path", "cache_requests", "rewrite_requests_cache", "use_cache", "verbosity"}
    key = zlib.crc32(repr((*settings, args.torch_random_seed)).encode())
    return {
        **{field.name: getattr(args, field.name) for field in fields(args) if field.name not in own},
        "use_cache": f"{args.use_cache}_{key:08x}" if args.use_cache else None,
        "cache_requests": args.requests_cache in ("true", "refresh"),
        "rewrite_requests_cache": args.requests_cache == "refresh",
        "delete_requests_cache": args.requests_cache == "delete",
    }


def _save(run: Run, tracker: EvaluationTracker, results: dict[str, Any], args: EvalArguments) -> None:
    """The harness's files, and ours: how fast each task was."""
    samples = results.pop("samples", {})
    tracker.save_results_aggregated(results, samples if args.log_samples else None)
    for name, said in samples.items():
        tracker.save_results_samples(name, said)
    for kind in ("results", *(f"samples_{name}" for name in samples)):
        if not list(run.folder.glob(f"*/{kind}_*.json*")):  # the harness does not raise
            raise RecordError(f"cannot write {kind} into {run.folder}")
    records = [record for _, record in sorted(run.records().items())]
    tasks = {task: _figures(own) for task, own in _by_task(records).items()}
    run.finish(records, {"tasks": tasks})


def _show(run: Run, results: dict[str, Any], args: EvalArguments) -> None:
    """The harness's tables, and for each task that generates a line about its speed."""
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    for task, own in _by_task(run.records().values()).items():
        figures, size = _figures(own), args.generation_batch_size
        line = f"{task}: {len(own)} answers, {figures['speed']['tokens_per_second']:.1f} tokens/s"
        if size > 1:
            line += f" in batches of {size}"
        if accepted := figures.get("acceptance"):
            line += (
                f", acceptance rate {accepted['acceptance_rate'] or 0:.1%}, mean accepted length "
                f"{accepted['mean_accepted_length'] or 1:.2f}"
            )
        print(line)
    print(f"\n{run.folder}/: run.json, records.jsonl, and the harness's results and samples")


def _by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["task"], []).append(record)
    return found


def _figures(records: list[Record]) -> Record:
    figures: Record = {"speed": metrics.speed(records)}
    if "num_verifications" in records[0]:
        figures["acceptance"] = metrics.acceptance(records)
    return figures


if __name__ == "__main__":
    run(main)
