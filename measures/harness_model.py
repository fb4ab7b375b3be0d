"""A model of lm-evaluation-harness that answers by a generation strategy of this library.

The harness's own Hugging Face model computes log-likelihoods, except those of an early exit and those of
16-bit weights with fp32 activations.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from tqdm import tqdm

from measures.timed_runs import measure_examples, warm_up
from runs import ranks
from runs.failures import failed
from runs.records import Record
from runs.status import log_if_slow
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, Request, Sampler
from self_speculation.config import SAMPLING_RULES
from self_speculation.families import context_length
from self_speculation.passes.fused_layers import activation_dtype
from self_speculation.passes.model_runner import ModelRunner, forward_early
from self_speculation.threads import adjust_threads

# Supported generation arguments; the harness has four names for the number of tokens.
_NUMBER_OF_TOKENS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
_SUPPORTED = {"until", "do_sample", *SAMPLING_RULES, "no_repeat_ngram_size"}
# Sampling rules without a value, as in transformers' `generate`.
_DEFAULTS = {**asdict(Sampler()), "top_k": 50}


class UnsupportedError(ValueError):
    """A request has generation arguments that this model does not support."""


def request_config(gen_kwargs: dict[str, Any], config: GenerationConfig, defaults: Any) -> GenerationConfig:
    """`config` with the generation arguments of a request.

    Defaults of sampling rules are those of the model's settings, as in transformers' `generate`.

    Raises:
        UnsupportedError: names unsupported arguments, or a value that is out of range.
    """
    known = _SUPPORTED | _NUMBER_OF_TOKENS
    if wrong := {k: v for k, v in gen_kwargs.items() if k not in known and (k, v) != ("num_beams", 1)}:
        names = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise UnsupportedError(f"{names}: supported are max_gen_toks, {', '.join(sorted(_SUPPORTED))}")

    try:
        given = normalize_gen_kwargs(gen_kwargs)
        own = {name: getattr(defaults, name, None) for name in SAMPLING_RULES}
        rules = {n: v for part in (_DEFAULTS, own, given) for n, v in part.items() if v is not None}
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


class _Task(NamedTuple):
    instance: Instance
    repeat: int  # earlier occurrences among this rank's requests
    config: GenerationConfig
    request: Request

    @property
    def name(self) -> str:
        return f"{self.instance.task_name}, document {self.instance.doc_id}"


class HarnessModel(HFLM):
    """Computes log-likelihoods and completions for the harness.

    `has_begun` is True from the first pass on. `records` has a record of each completion. A sampled one
    depends on the seed, its document and its number alone.
    """

    def __init__(
        self,
        generator: HuggingfaceLlamaGenerator,
        config: GenerationConfig,  # settings that requests do not have, such as the exit layer
        seed: int,
        **sizes: Any,  # of batches, as the harness's own model takes them
    ) -> None:
        self._generator, self._settings, self._seed = generator, config, seed
        early = config.generation_strategy == "autoregressive" and config.exit_layer != -1
        self._exit_layer = config.exit_layer if early else None
        self._room = context_length(generator.model.config)
        self._has_fp32_activations = activation_dtype(generator.model) != generator.model.dtype
        self.records: list[Record] = []
        self.has_begun = False
        logging.disable(logging.WARNING)  # the harness warns of several ranks
        super().__init__(
            pretrained=generator.model,
            tokenizer=generator.tokenizer,
            backend="causal",
            max_length=self._room if early else None,
            **sizes,
        )
        logging.disable(logging.NOTSET)
        if ranks.num_processes() > 1:  # the harness does this only for models that it loads
            patience = InitProcessGroupKwargs(timeout=ranks.PATIENCE)
            self.accelerator = Accelerator(cpu=self.device.type == "cpu", kwargs_handlers=[patience])
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """[B, T] ids, padded on the right -> [B, T, V] logits of the full model or of the early exit."""
        self.has_begun = True
        adjust_threads(self.model)
        # transformers' layers would round fp32 activations to 16 bits.
        if self._exit_layer is None and not self._has_fp32_activations:
            return super()._model_call(inps, attn_mask, labels)
        (rows, width), runner = inps.shape, ModelRunner(self.model)
        cache = runner.new_cache(width, width, num_slots=rows)
        cache.set_rows([0] * rows)
        cache.is_prompt = True
        with torch.inference_mode():
            last = self._exit_layer or len(runner.layers)
            return forward_early(runner, cache, inps, last, width).logits

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A completion of each request, by its own generation arguments.

        Raises:
            UnsupportedError: names the task and the argument, before anything is generated.
            Failed: names the document that did not fit in memory.
        """
        repeats: dict[int, Iterator[int]] = defaultdict(itertools.count)
        tasks = [self._encoded(each, next(repeats[id(each)])) for each in requests]
        self.has_begun = True
        size = self._detect_batch_size() if self.batch_size == "auto" else self.batch_size
        longest = max(tasks, key=lambda task: len(task.request.ids))
        most = max(task.config.max_steps for task in tasks)
        try:
            with log_if_slow("warming up"):
                side = "", self._generator, replace(longest.config, max_steps=most)
                warm_up([side], longest.request.ids, size)
        except Exception as error:
            raise failed(longest.name, error, size) from error
        asked, answers = dict(enumerate(task.request for task in tasks)), {}
        measured = measure_examples([("", self._generator, self._settings)], asked, size)
        hidden = disable_tqdm or self.rank != 0 or None  # None: unless at a terminal
        for index, record in tqdm(measured, "answers", len(tasks), disable=hidden):
            if isinstance(record, Exception):
                raise failed(tasks[index].name, record, size) from record
            answers[index] = self._answer(tasks[index], record)
        return [answers[index] for index in range(len(tasks))]

    def _encoded(self, instance: Instance, repeat: int) -> _Task:
        """Encode a request; cut a prompt that is too long for the context on the left."""
        context, gen_kwargs = instance.args
        try:
            config = request_config(gen_kwargs, self._settings, self.model.generation_config)
            if (room := self._room - config.max_steps) < 1:
                raise UnsupportedError(
                    f"max_gen_toks {config.max_steps}: must be below the {self._room} positions of the "
                    "model, --max_steps lowers it"
                )
        except UnsupportedError as error:
            raise UnsupportedError(f"{instance.task_name} asks for {error}") from error
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(list(config.stop_words or []), eos)
        config = replace(config, stop_words=[text for text in until if text])
        ids = self.tok_batch_encode([context], left_truncate_len=room)[0][0].tolist()
        # The seed depends neither on the rank nor on the order.
        name = f"{instance.task_name} {instance.doc_id} {instance.idx} {repeat}"
        seed = self._seed + zlib.crc32(name.encode())
        return _Task(instance, repeat, config, Request(ids, seed=seed, config=config))

    def _answer(self, task: _Task, record: Record) -> str:
        """The completion, cut and cached as the harness does it for its own model."""
        answer = self.tok_decode(record["tokens"])
        answer = postprocess_generated_text(answer, task.config.stop_words, think_end_token=None)
        self.cache_hook.add_partial("generate_until", task.instance.args, answer)
        if task.repeat < (task.instance.repeats or 1):  # others only pad this rank's share
            kind = {"task": task.instance.task_name, "greedy": task.config.greedy}
            self.records.append({**kind, **record})
        return answer
