"""Evaluate tasks of lm-evaluation-harness with the strategies of this library.

    python eval.py --include_path eval_tasks --tasks python_functions,python_lines --sample False
    python eval.py --tasks gsm8k --generation_strategy self_speculative --exit_layer 8 --num_speculations 6
    python eval.py --tasks hellaswag --exit_layer 12    # the early exit at layer 12 alone

Tasks have generation settings; a flag that is given overrides them, as --gen_kwargs does.
Log-likelihoods are the full model's, or the early exit's with --exit_layer and the autoregressive
strategy. All other flags of lm_eval: python -m measures.harness_model run --model self_speculative ...
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from arguments import SELDOM, GenerationConfig, ModelArguments, at_least, check, given_flags, parse, refuse
from runs.failures import check_writable
from runs.flags import validate
from runs.program import run


@dataclass(frozen=True)
class EvalArguments:
    """What to evaluate. Defaults are lm_eval's, as in `simple_evaluate`."""

    tasks: list[str] | None = None
    """Names of tasks or groups, with commas or spaces between them; * stands for any letters."""
    include_path: str | None = None
    """Folder with YAML files of more tasks, such as eval_tasks."""
    output_path: str | None = None
    """Folder or .json file for results; without it, --output_dir."""
    batch_size: str = "1"
    """Sequences at a time, or auto, or auto:N to look for the largest that fits N times."""
    num_fewshot: int | None = None
    """Solved examples before each question; without it, as the task says."""
    limit: float | None = None
    """Documents of each task at most, or a share of them below 1."""
    use_cache: str | None = None
    """Path of a file that keeps answers, but for sampled ones; the same command then goes on."""
    cache_requests: bool = False
    """Keep the prompts of tasks on the disk."""
    rewrite_requests_cache: bool = False
    """Make the kept prompts anew."""
    delete_requests_cache: bool = False
    """Delete the kept prompts."""
    bootstrap_iters: int = 100000
    """Samples for standard errors; 0: none."""
    check_integrity: bool = False
    """Test the tasks."""
    write_out: bool = False
    """Print the prompt of the first documents."""
    log_samples: bool = True
    """Save prompts and answers, too."""
    system_instruction: str | None = None
    """System message of each prompt."""
    apply_chat_template: bool = False
    """Format prompts by the tokenizer's chat template."""
    fewshot_as_multiturn: bool = True
    """Solved examples are turns of a chat, with --apply_chat_template."""
    gen_kwargs: str | None = None
    """Settings that override a task's, as k=v,k=v."""
    predict_only: bool = False
    """Save answers, without metrics."""
    confirm_run_unsafe_code: bool = False
    """Run answers as programs, for tasks such as humaneval and mbpp. Nothing confines these programs."""
    verbosity: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "WARNING"
    """Lines of lm_eval about progress."""
    random_seed: int = 0
    """Seed of Python's random module."""
    numpy_random_seed: int = 1234
    """Seed of numpy."""
    torch_random_seed: int = 1234
    """Seed of torch; --seed is the seed of sampled answers."""
    fewshot_random_seed: int = 1234
    """Seed of the choice of solved examples."""

    def __post_init__(self) -> None:
        names = [name for word in self.tasks or () for name in word.split(",") if name]
        object.__setattr__(self, "tasks", names)
        is_size = re.fullmatch(r"auto(:\d+)?|[1-9]\d*", self.batch_size)
        check(self, "batch_size", bool(is_size), "must be a number from 1, auto or auto:N")
        check(self, "include_path", Path(self.include_path or ".").is_dir(), "no such folder")
        at_least(self, 0, "num_fewshot", "bootstrap_iters")
        check(self, "limit", self.limit is None or self.limit > 0, "must be above 0")


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, EvalArguments)
    model_args, config, args = parse(__doc__ or "", *groups, args=argv, without={*SELDOM} - {"reuse_cache"})
    if not args.tasks:
        refuse("--tasks: needs names of tasks, such as python_functions with --include_path eval_tasks")
    validate(model_args, config)
    path = Path(args.output_path or model_args.output_dir)
    check_writable("output_path", path.parent if path.suffix == ".json" else path)
    if args.use_cache is not None:
        check_writable("use_cache", Path(args.use_cache).parent)

    from runs.startup import read_config

    read_config(model_args)  # the harness takes seconds to look for all tasks

    from lm_eval.utils import simple_parse_args_string

    from measures.harness_model import TASK_SETTINGS, evaluate

    gen_kwargs = simple_parse_args_string(args.gen_kwargs)
    if "until" in gen_kwargs:  # lm_eval parses 5 as a number, and then needs a text
        gen_kwargs["until"] = [str(gen_kwargs["until"])]
    given = given_flags(argv, GenerationConfig)
    asked = {theirs: getattr(config, ours) for ours, theirs in TASK_SETTINGS.items() if ours in given}
    # Sampling needs a temperature: greedy tasks set it to 0.
    warm = {"temperature": config.temperature} if asked.get("do_sample") else {}
    settings = {"pretrained": model_args.model_name} | {
        each.name: value
        for group in (model_args, config)
        for each in fields(group)
        if (value := getattr(group, each.name)) != each.default
        and each.name not in {*TASK_SETTINGS, "model", "output_dir"}
    }
    if args.use_cache is not None:
        # The harness's keys hold the request alone: without this it would reuse answers of another model.
        key = repr({**settings, "threads": None}).encode()
        args = replace(args, use_cache=f"{args.use_cache}_{zlib.crc32(key):08x}")
    return evaluate(settings, replace(args, output_path=str(path)), {**warm, **gen_kwargs, **asked})


if __name__ == "__main__":
    run(main)
