"""A model of lm-evaluation-harness that answers by a generation strategy of this library.

Log-likelihoods come from the harness's own Hugging Face model, or from an early exit where that is what is
evaluated. Knows nothing of flags or files.
"""

from __future__ import annotations

import copy
import zlib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from tqdm import tqdm

from measures.timed_runs import measure_example, warm_up
from runs.failures import named
from runs.records import Record
from runs.startup import get_ready
from runs.status import says_if_slow
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.model.families import attended_length
from self_speculation.model.whole_texts import exit_logits, hidden_after_each_layer

# What a task may ask of generation, besides the names that the harness has for the number of tokens.
SUPPORTED_GENERATION_KWARGS = {"until", "do_sample", "temperature", "top_k", "top_p", "no_repeat_ngram_size"}
_NUMBER_OF_TOKENS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
_DEFAULT_NUMBER_OF_TOKENS = 256  # as in the harness
_DEFAULT_TOP_K = 50  # of `generate` of transformers, which the harness calls


def unsupported(generation_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The generation arguments that cannot be honoured; `num_beams=1`, which changes nothing, is none."""
    known = SUPPORTED_GENERATION_KWARGS | _NUMBER_OF_TOKENS
    return {
        name: value
        for name, value in generation_kwargs.items()
        if name not in known and (name, value) != ("num_beams", 1)
    }


def request_config(
    generation_kwargs: dict[str, Any],
    config: GenerationConfig,
    overrides: Collection[str] = (),
    default_top_k: int = _DEFAULT_TOP_K,
    default_top_p: float = 1.0,
) -> GenerationConfig:
    """What a request asks for, except for the fields of `config` that `overrides` names.

    Raises:
        ValueError: a value is out of range.
    """
    asked = normalize_gen_kwargs(copy.deepcopy(generation_kwargs), _DEFAULT_NUMBER_OF_TOKENS)
    sample = bool(asked["do_sample"])
    fields = {
        "max_steps": asked["max_gen_toks"],
        "sample": sample,
        # For greedy decoding the harness sets a temperature of 0, which would undo --sample True.
        "temperature": asked.get("temperature", 1.0) if sample else config.temperature,
        "top_k": asked.get("top_k", default_top_k) or 0,
        "top_p": asked.get("top_p", default_top_p),
        "no_repeat_ngram_size": asked.get("no_repeat_ngram_size") or None,
        "stop_words": [str(text) for text in asked["until"] if text not in (None, "")],
    }
    return replace(config, **{name: value for name, value in fields.items() if name not in overrides})


class HarnessModel(HFLM):
    """The model that the harness asks for log-likelihoods and answers.

    Args:
        generator: model, tokenizer and strategy.
        config: exit layer and draft length, and all settings that a request does not have.
        overrides: fields of `config` that count in place of what requests say.
        batch_size: of log-likelihoods, as the harness has it.
        seed: of sampled answers; each depends on this, its document and its number alone.
        keep: called with the record of each answer.
        accelerator: where there are several ranks.
    """

    def __init__(
        self,
        generator: HuggingfaceLlamaGenerator,
        config: GenerationConfig,
        overrides: Collection[str],
        batch_size: str,
        seed: int,
        keep: Callable[[Record], None],
        accelerator: Accelerator | None = None,
    ) -> None:
        self._generator, self._settings, self._seed, self._keep = generator, config, seed, keep
        self._overrides = overrides
        early = config.generation_strategy == "autoregressive" and config.exit_layer != -1
        self._exit_layer = config.exit_layer if early else None
        self._room = attended_length(generator.model.config)
        self.notices: Counter[str] = Counter()  # how often which change made a request fit
        super().__init__(
            pretrained=generator.model,
            tokenizer=generator.tokenizer,
            batch_size=batch_size,
            backend="causal",
            max_length=self._room if early else None,
        )
        if accelerator is not None:  # the harness leaves this to us for a model that is loaded already
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """[B, T] ids, padded on the right -> [B, T, V] logits of the full model or of the early exit."""
        if self._exit_layer is None:
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            states = hidden_after_each_layer(self.model, inps)
            return exit_logits(self.model, next(islice(states, self._exit_layer - 1, None)))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request, by its own generation arguments."""
        answers = []
        seen: Counter[int] = Counter()
        notices = self.notices.copy()
        longest = {r.task_name: r for r in sorted(requests, key=lambda request: len(request.args[0]))}
        for request in longest.values():  # of each task, which may have settings of its own
            ids, config = self._question(request)
            with named(f"{request.task_name}, document {request.doc_id}"):
                get_ready(self._generator, config, len(ids))
                with says_if_slow("warming up"):
                    warm_up([("", self._generator, config)], ids)
        self.notices = notices
        with tqdm(requests, desc="answers", disable=disable_tqdm or self.rank != 0) as bar:
            for position, request in enumerate(bar):
                repeat = seen[id(request)]
                seen[id(request)] += 1
                with named(f"{request.task_name}, document {request.doc_id}"):
                    answer, record = self._answer(request, repeat)
                answers.append(answer)
                if repeat < (request.repeats or 1):  # else the harness has padded this rank's share
                    index = position * self.world_size + self.rank
                    self._keep(
                        {"index": index, "task": request.task_name, "doc_id": request.doc_id, **record}
                    )
                speed = len(record["tokens"]) / (record["prefill_time"] + record["decode_time"])
                bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
        return answers

    def _question(self, request: Instance) -> tuple[list[int], GenerationConfig]:
        """Prompt and settings, both cut so that the answer fits the model's context."""
        context, gen_kwargs = request.args
        of_model = self.model.generation_config
        config = request_config(
            gen_kwargs,
            self._settings,
            self._overrides,
            default_top_k=_DEFAULT_TOP_K if of_model.top_k is None else of_model.top_k,
            default_top_p=1.0 if of_model.top_p is None else of_model.top_p,
        )
        if config.max_steps >= self._room:  # leave room for the question
            config = replace(config, max_steps=self._room // 2)
            self.notices["answers cut to half the context"] += 1
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = [text for text in handle_stop_sequences(list(config.stop_words or []), eos) if text]
        config = replace(config, stop_words=until)
        ids = self.tok_batch_encode([context])[0][0].tolist()
        if len(ids) > (room := self._room - config.max_steps):
            ids = ids[-room:]
            self.notices["prompts cut on the left"] += 1
        return ids, config

    def _answer(self, request: Instance, repeat: int) -> tuple[str, Record]:
        context, gen_kwargs = request.args
        ids, config = self._question(request)
        place = zlib.crc32(f"{request.task_name} {request.doc_id} {request.idx} {repeat}".encode())
        record = measure_example([("", self._generator, config)], ids, place, self._seed)
        # The harness cuts the answers of its own model in the same way.
        answer = self.tok_decode(record["tokens"])
        answer = postprocess_generated_text(answer, config.stop_words or [], think_end_token=None)
        self.cache_hook.add_partial("generate_until", (context, gen_kwargs), answer)
        return answer, {"prompt": context, **record, "prediction": answer}
