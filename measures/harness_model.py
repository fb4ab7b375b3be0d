"""Evaluations by lm-evaluation-harness, with a model that decodes by a strategy of this library.

`evaluate` is the work of eval.py. As the harness's command line, with all flags of the harness:

    python -m measures.harness_model run --model self_speculative --tasks gsm8k \\
        --model_args pretrained=ID,generation_strategy=self_speculative,exit_layer=8,num_speculations=6

The harness's Hugging Face model does the rest, but for the log-likelihoods of an early exit, or of
16-bit weights with fp32 activations.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import zlib
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import lm_eval.tasks
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.loggers import EvaluationTracker, evaluation_tracker
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import make_table, setup_logging
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from arguments import GenerationConfig, ModelArguments, refuse
from data import one_line
from measures import metrics
from measures.timed_runs import measure_examples
from runs import ranks
from runs.description import Record, counted
from runs.failures import Failed, reason
from runs.flags import validate
from runs.startup import load_generator
from runs.status import print_status
from self_speculation import Request, Sampler
from self_speculation.backends.runners import activation_dtype, eager_runner
from self_speculation.config import SAMPLING_RULES, check
from self_speculation.machine.threads import adjust_threads
from self_speculation.models.families import context_length

# Fields of a config that tasks set, and the harness's names of them.
TASK_SETTINGS = {
    "max_steps": "max_gen_toks", "sample": "do_sample", "no_repeat_ngram_size": "no_repeat_ngram_size",
    "stop_words": "until", **{name: name for name in SAMPLING_RULES},
}  # fmt: skip
# The harness has four names for the number of tokens, and a beam of one is greedy.
_SUPPORTED = {*TASK_SETTINGS.values(), "max_new_tokens", "max_tokens", "max_completion_tokens", "num_beams"}
# Flags that `simple_evaluate` does not take.
_OURS = ("tasks", "include_path", "output_path", "verbosity")
# Sampling rules without a value, as in transformers' `generate`.
_DEFAULTS = {**asdict(Sampler()), "top_k": 50}


class UnsupportedError(ValueError):
    """A request has generation arguments that this model does not support."""


def request_config(gen_kwargs: Record, config: GenerationConfig, defaults: object) -> GenerationConfig:
    """`config` with the generation arguments of a request.

    Defaults of sampling rules come from the model's settings, as in transformers' `generate`.

    Raises:
        UnsupportedError: names unsupported arguments, or a value that is out of range.
    """
    wrong = {k: v for k, v in gen_kwargs.items() if k not in _SUPPORTED or (k == "num_beams" and v != 1)}
    if wrong:
        names = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise UnsupportedError(f"{names}: supported are {', '.join(sorted(TASK_SETTINGS.values()))}")
    try:
        given = normalize_gen_kwargs(gen_kwargs)
        model_rules = {name: getattr(defaults, name, None) for name in SAMPLING_RULES}
        found = [_DEFAULTS, model_rules, given]
        rules = {name: value for each in found for name, value in each.items() if value is not None}
        return replace(
            config,
            max_steps=given["max_gen_toks"],
            sample=bool(given["do_sample"]),
            **{name: rules[name] for name in SAMPLING_RULES},
            no_repeat_ngram_size=given.get("no_repeat_ngram_size") or None,
            stop_words=[str(text) for text in given["until"] if text not in (None, "")],
        )
    except (ValueError, TypeError) as error:
        raise UnsupportedError(str(error)) from error


@register_model("self_speculative")
class SelfSpeculativeLM(HFLM):
    """Log-likelihoods and completions for the harness.

    A sampled completion depends on the seed, on the prompt, and on how often the prompt was asked before.
    `has_begun` is True from the first pass on. `records` has the times and drafts of each completion.

    Args:
        pretrained: hub id, folder or .gguf file; None: the bundled model.
        batch_size, max_batch_size, device: as in the harness's Hugging Face model.
        settings: fields of `ModelArguments`, and the fields of `GenerationConfig` that tasks do not set.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        device: str = "auto",
        **settings: Any,
    ) -> None:
        if task_settings := settings.keys() & TASK_SETTINGS.keys():
            refuse(f"--model_args {', '.join(sorted(task_settings))}: a setting of tasks, use --gen_kwargs")
        model_fields = {each.name for each in fields(ModelArguments)} & settings.keys()
        try:
            loading = {name: settings.pop(name) for name in model_fields}
            model_args = ModelArguments(model=pretrained, device=device, **loading)
            config = GenerationConfig(**settings)
        except (TypeError, ValueError) as error:
            refuse(f"--model_args {error}")
        validate(model_args, config)
        self._generator = load_generator(model_args, config)
        self._settings = config
        self._seed = model_args.seed
        self._asked = Counter[tuple[int, ...]]()
        self.has_begun = False
        self.records: list[Record] = []
        model = self._generator.model
        early = config.generation_strategy == "autoregressive" and config.exit_layer != -1
        # transformers' layers would round fp32 activations to 16 bits.
        runs_layers = early or activation_dtype(model) != model.dtype
        self._depth = (config.exit_layer if early else len(model.base_model.layers)) if runs_layers else None
        logging.disable(logging.WARNING)  # the harness warns of several ranks
        super().__init__(
            pretrained=model,
            tokenizer=self._generator.tokenizer,
            backend="causal",
            max_length=context_length(model.config),
            batch_size=batch_size,
            max_batch_size=max_batch_size,
        )
        logging.disable(logging.NOTSET)
        if ranks.num_processes() > 1:  # the harness does this only for models that it loads
            patience = InitProcessGroupKwargs(timeout=ranks.PATIENCE)
            self.accelerator = Accelerator(cpu=self.device.type == "cpu", kwargs_handlers=[patience])
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """[B, T] ids, padded on the right -> [B, T, V] logits of the full model or of the early exit."""
        self.has_begun = True
        adjust_threads(self.model)
        if self._depth is None:
            return super()._model_call(inps, attn_mask, labels)
        rows, width = inps.shape
        runner = eager_runner(self.model)
        cache = runner.new_cache(width, width, rows, self._settings.cache_dtype)
        cache.set_rows([0] * rows)
        with torch.inference_mode():
            return runner.run(cache, inps, 0, self._depth, width).logits

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A completion of each request, by the request's generation arguments.

        Raises:
            UnsupportedError: names the task and the argument, before anything is generated.
        """
        for request in requests:
            try:
                config = request_config(request.args[1], self._settings, None)
                fits = config.max_steps < self.max_length
                check(config, "max_steps", fits, f"must be below the model's {self.max_length} positions")
            except ValueError as error:
                raise UnsupportedError(f"{request.task_name} asks for {error}") from error
        return super().generate_until(requests, disable_tqdm)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **gen_kwargs: Any) -> Tensor:
        """[B, T] ids, padded on the left -> [B, T + n] with completions, padded on the right."""
        self.has_begun = True
        adjust_threads(self.model)
        mask = gen_kwargs.pop("attention_mask").bool()
        gen_kwargs |= {"until": stop, "max_gen_toks": max_length - context.shape[1]}
        config = request_config(gen_kwargs, self._settings, self.model.generation_config)
        requests = {}
        began = len(self.records)
        for index, (row, used) in enumerate(zip(context, mask, strict=True), began):
            ids = row[used].tolist() or [self.prefix_token_id]
            seed = self._seed + zlib.crc32(f"{ids} {self._asked[tuple(ids)]}".encode())
            self._asked[tuple(ids)] += 1
            requests[index] = Request(ids, seed=seed)
        outputs = [context.new_empty(0)] * len(requests)
        side = ("", self._generator, config)
        for index, record in measure_examples([side], deque(requests.items()), len(requests)):
            if isinstance(record, Exception):
                raise record
            outputs[index - began] = context.new_tensor(record["tokens"])
            self.records.append({k: v for k, v in record.items() if k not in ("tokens", "prediction")})
        padded = pad_sequence(outputs, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return torch.cat([context, padded], 1).long()


def evaluate(settings: Record, args: Any, gen_kwargs: Record) -> int:
    """Evaluate, print tables and save results; the exit status.

    Args:
        settings: arguments of `SelfSpeculativeLM`.
        args: an `EvalArguments`.
        gen_kwargs: override settings of tasks.
    """
    setup_logging(args.verbosity)
    try:
        request_config(gen_kwargs, GenerationConfig(), None)
    except UnsupportedError as error:
        refuse(f"--gen_kwargs {error}")
    tasks = lm_eval.tasks.TaskManager(include_path=args.include_path)
    for name in args.tasks:
        if not tasks.match_tasks([name]):
            hint = "; tasks of this program need --include_path eval_tasks" * (not args.include_path)
            refuse(f"--tasks {name}: lm_eval has no such task{hint}")
    if args.confirm_run_unsafe_code:
        print_status("Answers of tasks such as humaneval run as programs. Nothing confines these programs.")
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # `code_eval` of evaluate asks for the consent once more
    tracker = EvaluationTracker(output_path=args.output_path)
    model = SelfSpeculativeLM(**settings, batch_size=args.batch_size)
    theirs = {name: value for name, value in asdict(args).items() if name not in _OURS}
    kept = "; the same command goes on with what --use_cache kept" if args.use_cache else ""
    try:
        results = simple_evaluate(
            model,
            model_args=settings,
            tasks=tasks.match_tasks(args.tasks),
            evaluation_tracker=tracker,
            task_manager=tasks,
            **{**theirs, "gen_kwargs": gen_kwargs or None},
        )
    except KeyboardInterrupt:
        print_status(f"\ninterrupted{kept}")
        return 130
    except Exception as error:
        size = model.batch_size if isinstance(model.batch_size, int) else model.max_batch_size  # not auto
        if (why := reason(error, batch_size=size)) is not None:
            print(f"\n{why}{kept}", file=sys.stderr)
            return 1
        if model.has_begun and not isinstance(error, UnsupportedError):
            raise
        if not args.confirm_run_unsafe_code and re.search("HF_ALLOW_CODE_EVAL|unsafe_code", str(error)):
            names = " ".join(args.tasks)
            refuse(f"--tasks {names}: answers run as programs, which needs --confirm_run_unsafe_code True")
        refuse(f"lm_eval: {one_line(error)}")  # tasks or data sets
    records = model.gather_object(model.records)
    if results is not None:  # at rank 0
        completions = [*chain(*records)]
        generated: Record | None = None
        if completions:
            generated = {"num_answers": len(completions), "speed": metrics.speed(completions)}
            if "drafts" in completions[0]:
                generated["acceptance"] = metrics.acceptance(completions)
        results["generation"] = generated  # speed and drafts, as in `run.json` of benchmark.py
        samples = results.pop("samples", {})
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
        if generated is not None:
            print(_shown(generated))
        _save(tracker, results, samples)
        print(f"results are in {args.output_path}")
    return 0


def _save(tracker: EvaluationTracker, results: Record, samples: Mapping[str, list[Record]]) -> None:
    """Write the harness's files; no file is cut short under its name. Raises Failed if one cannot be
    written.
    """
    path = Path(tracker.output_path)
    names_file = path.suffix == ".json"
    folder = path.parent if names_file else path

    def fail(*_: object) -> None:
        raise  # the error of which the harness would only warn

    try:
        with (
            TemporaryDirectory(prefix=".partial-", dir=folder) as partial,
            patch.object(evaluation_tracker.eval_logger, "warning", fail),
        ):
            tracker.output_path = str(Path(partial, path.name)) if names_file else partial
            tracker.save_results_aggregated(results=results, samples=samples)
            for name, task_samples in samples.items():
                tracker.save_results_samples(task_name=name, samples=task_samples)
            for file in [each for each in Path(partial).rglob("*") if each.is_file()]:
                target = folder / file.relative_to(partial)
                target.parent.mkdir(exist_ok=True)
                file.replace(target)
    except OSError as error:
        raise Failed(f"cannot write {folder}: {error.strerror}") from error


def _shown(generated: Record) -> str:
    """Lines about completions."""
    speed = generated["speed"]
    answers = counted(generated["num_answers"], "answer")
    tokens = f"{counted(speed['num_tokens'], 'token')} in {speed['total_time']:.1f} s"
    lines = [f"{answers}, {tokens}: {speed['tokens_per_second']:.2f} tokens/s by wall time, first passes too"]
    if (drafts := generated.get("acceptance", {})).get("num_drafted"):
        each = f"mean of answers {drafts['acceptance_rate_mean']:.1%}"
        length = f"mean accepted length {drafts['mean_accepted_length']:.2f}"
        lines.append(f"acceptance rate {drafts['acceptance_rate']:.1%}, {each}, {length}")
    return "\n".join(lines)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    if "run" in sys.argv and not any(word.startswith("--device") for word in sys.argv):
        sys.argv += ["--device", "auto"]  # the harness would take cuda:0
    cli_evaluate()
