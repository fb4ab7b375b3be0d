"""One run of lm_eval's command line, with a model that generates by a strategy of this library."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.registry import model_registry
from lm_eval.utils import setup_logging

from arguments import GenerationConfig, ModelArguments, refuse
from data import one_line
from measures.harness_model import HarnessModel, UnsupportedError, request_config
from measures.metrics import draft_stats, speed
from runs import ranks
from runs.failures import reason
from runs.records import Record, counted, describe, describe_model, machine
from runs.startup import load_generator
from runs.status import print_status

_NAME = "self_speculation"  # what lm_eval calls our model
_LESS = "a smaller --batch_size, --dtype half, --quantization int8 or int4"


@dataclass
class _Loader:
    """A lazy model in the harness's registry. All compare equal, so a second one may be registered there."""

    create_from_arg_obj: Callable[[Any, dict[str, Any]], HarnessModel] = field(compare=False)


def evaluate(
    model_args: ModelArguments,
    config: GenerationConfig,
    args: argparse.Namespace,
) -> int:
    """Let lm_eval evaluate, print and save; then print the speed of each task. Returns the exit status.

    `config` has the settings that tasks do not have, such as the exit layer; `args` has lm_eval's flags.
    """
    try:
        request_config(args.gen_kwargs, config, None)
    except UnsupportedError as error:
        refuse(f"--gen_kwargs {error}")

    loaded: list[HarnessModel] = []

    def load(_: Any, sizes: dict[str, Any]) -> HarnessModel:
        """Called by the harness once it has found the tasks."""
        generator = load_generator(model_args, config)
        if ranks.is_first():  # above lm_eval's table
            print(machine(describe("eval", ()) | describe_model(model_args.model_name, generator.model)))
        sizes = {name: size for name, size in sizes.items() if size is not None and name != "device"}
        loaded.append(HarnessModel(generator, config, model_args.seed, **sizes))
        return loaded[0]

    model_registry.register(_NAME, target=_Loader(load))
    args.model, args.model_args = _NAME, {"pretrained": model_args.model_name, **args.model_args}
    try:
        setup_logging(args.verbosity or logging.INFO)
        args.func(args)
        for model in loaded:
            if (gathered := model.gather_object(model.records)) is not None:  # at rank 0
                _show(list(itertools.chain.from_iterable(gathered)))
                print(f"\nresults are in {args.output_path}")
    except KeyboardInterrupt:
        print_status(f"interrupted; {_kept(args)}")
        return 130
    except Exception as error:
        if (why := reason(error, _LESS)) is not None:
            print(f"{why}; {_kept(args)}", file=sys.stderr)
            return 1
        if any(model.has_begun for model in loaded) and not isinstance(error, UnsupportedError):
            raise
        why = one_line(error)  # wrong flags, tasks or data sets
        if why.startswith("Tasks not found") and not args.include_path:
            why += "; those of this program, such as python_functions, need --include_path eval_tasks"
        refuse(f"lm_eval: {why}")
    return 0


def _kept(args: argparse.Namespace) -> str:
    if args.use_cache:
        return "the same command goes on with what --use_cache kept: all answers but sampled ones"
    return "--use_cache PATH would have kept answers to go on from"


def _show(records: list[Record]) -> None:
    """Print speed and acceptance of each task that generates; `records` are those of all ranks."""
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_task[record["task"]].append(record)
    for task, own in by_task.items():
        picked = " and ".join(sorted({"greedy" if record["greedy"] else "sampled" for record in own}))
        line = (
            f"{task}: {counted(len(own), 'answer')}, {picked}, {speed(own)['tokens_per_second']:.1f} tokens/s"
        )
        if (size := own[0]["batch_size"]) > 1:
            line += f" in batches of {size}"
        if "drafts" in own[0]:
            drafts = draft_stats(own)
            line += (
                f", acceptance rate {drafts.acceptance_rate or 0:.1%}, mean accepted length "
                f"{drafts.mean_accepted_length or 1:.2f}"
            )
        print(line)
