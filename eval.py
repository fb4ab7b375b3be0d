"""Evaluate tasks of lm-evaluation-harness with the strategies of this library.

    python eval.py --include_path eval_tasks --tasks python_functions,python_lines --sample False
    python eval.py --tasks gsm8k --generation_strategy self_speculative --exit_layer 8 --num_speculations 6
    python eval.py --tasks hellaswag --exit_layer 12    # the early exit at layer 12 alone

The flags below choose the model and its generation. All flags of lm_eval's own command line work, too; they
are listed at the end. If both have a flag (--model, --model_args, --device, --seed), the
one below counts.

Tasks have their own generation settings; a flag that is given overrides them, as --gen_kwargs does.
Log-likelihoods are those of the full model, or of the early exit with --exit_layer and the autoregressive
strategy. lm_eval writes its results to --output_path; without it, to --output_dir.
"""

from __future__ import annotations

if __name__ == "__main__":
    import runs.early  # noqa: F401

import argparse
import re
import zlib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from lm_eval._cli.run import Run

from arguments import NOT_MEASURED, GenerationConfig, ModelArguments, given_flags, parse, refuse
from runs.failures import check_writable
from runs.flags import validate
from runs.program import run
from self_speculation.config import SAMPLING_RULES

# Flags that override settings of tasks, and the harness's names of these settings.
TASK_SETTINGS = {
    "max_steps": "max_gen_toks", "sample": "do_sample", "no_repeat_ngram_size": "no_repeat_ngram_size",
    "stop_words": "until", **{name: name for name in SAMPLING_RULES},
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """lm_eval's parser; refuses bad usage in one line."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_known_args(*args, **kwargs)
        except (ValueError, AssertionError) as error:  # from its own parsing of values
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        refuse(message)


def main(argv: Sequence[str] | None = None) -> int:
    commands = _Parser().add_subparsers()
    Run.create(commands)
    groups = (ModelArguments, GenerationConfig)
    model_args, config, args = parse(
        __doc__ or "", *groups, args=argv, without=NOT_MEASURED, rest=commands.choices["run"]
    )
    validate(model_args, config)
    _read_config_file(args)
    given = given_flags(argv, GenerationConfig)
    asked = {theirs: getattr(config, ours) for ours, theirs in TASK_SETTINGS.items() if ours in given}
    # Sampling needs a temperature: greedy tasks set it to 0.
    warm = {"temperature": config.temperature} if asked.get("do_sample") else {}
    args.gen_kwargs = {**warm, **(args.gen_kwargs or {}), **asked}
    hidden = (*TASK_SETTINGS, "model", "output_dir")
    args.model_args = {  # lm_eval prints and saves them
        each.name: value
        for group in (model_args, config)
        for each in fields(group)
        if (value := getattr(group, each.name)) != each.default and each.name not in hidden
    }
    if getattr(args, "trust_remote_code", False):
        refuse("--trust_remote_code: here it is --model_args trust_remote_code=True")
    args.device, args.trust_remote_code = model_args.device, model_args.loading_options().trust_remote_code
    if "seed" in given_flags(argv, ModelArguments):
        args.seed = [model_args.seed] * 4
    if args.use_cache:
        # The harness's keys hold the request alone: without this it would reuse answers of another model.
        key = zlib.crc32(repr((replace(model_args, output_dir="", threads=None), config)).encode())
        args.use_cache = f"{args.use_cache}_{key:08x}"
    args.output_path = args.output_path or model_args.output_dir
    # lm_eval would notice these values late, or not at all.
    if not args.tasks:
        refuse("--tasks: needs names of tasks, such as python_functions with --include_path eval_tasks")
    size = str(getattr(args, "batch_size", 1))
    if not re.fullmatch(r"auto(:\d+)?|[1-9]\d*", size):
        refuse(f"--batch_size {size}: must be a number from 1, auto or auto:N")
    path = Path(args.output_path)
    check_writable("output_path", path.parent if path.suffix == ".json" else path)
    from measures.evaluation import evaluate

    return evaluate(model_args, config, args)


def _read_config_file(args: argparse.Namespace) -> None:
    """Add the settings of the --config file that the command line lacks."""
    if args.config is None:
        return
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import simple_parse_args_string

    try:
        file = EvaluatorConfig.load_yaml_config(args.config)
        if isinstance(file.get("gen_kwargs"), str):
            file["gen_kwargs"] = simple_parse_args_string(file["gen_kwargs"])
    except (OSError, ValueError, TypeError) as error:
        refuse(f"--config {args.config}: {error}")
    if ours := {"model", "model_args", "device"} & file.keys():
        refuse(f"--config {args.config}: has {', '.join(sorted(ours))}, which are flags of eval.py")
    vars(args).update({name: value for name, value in file.items() if not getattr(args, name, None)})


if __name__ == "__main__":
    run(main)
