"""A model of lm-evaluation-harness that answers by a generation strategy of this library.

Log-likelihoods come from the harness's own Hugging Face model, or from an early exit where that is what is
evaluated. Knows nothing of flags or files.
"""

from __future__ import annotations

import copy
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from tqdm import tqdm

from measures.timed_runs import Question, measure_examples, warm_up
from runs.failures import named
from runs.records import Record
from runs.startup import get_ready
from runs.status import says_if_slow
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, RequestError
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
        at_a_time: answers that are generated side by side.
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
        at_a_time: int,
        seed: int,
        keep: Callable[[Record], None],
        accelerator: Accelerator | None = None,
    ) -> None:
        self._generator, self._settings, self._seed, self._keep = generator, config, seed, keep
        self._overrides, self._at_a_time = overrides, at_a_time
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
        asked = self._asked(requests)
        self._get_ready(asked)
        answers: dict[int, str] = {}
        tokens, seconds = 0, 0.0
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm or self.rank != 0) as bar:
            for place, record in self._measured(asked):
                answers[place], record = self._answer(asked[place], record)
                if asked[place].repeat < (asked[place].request.repeats or 1):  # else the harness has padded
                    self._keep(record)  # this rank's share
                tokens, seconds = tokens + record["num_tokens"], seconds + record["wall_time"]
                bar.set_postfix_str(f"{tokens / seconds:.1f} tokens/s", refresh=False)
                bar.update()
        return [answers[place] for place in range(len(requests))]

    def _asked(self, requests: list[Instance]) -> list[_Asked]:
        seen: Counter[int] = Counter()
        asked = []
        for place, request in enumerate(requests):
            ids, config = self._question(request)
            asked.append(_Asked(place, request, seen[id(request)], ids, config))
            seen[id(request)] += 1
        return asked

    def _get_ready(self, asked: Sequence[_Asked]) -> None:
        """For the longest question of each task, which may have settings of its own."""
        longest = {each.request.task_name: each for each in sorted(asked, key=lambda each: len(each.ids))}
        for each in longest.values():
            with named(each.name, self._at_a_time):
                get_ready(self._generator, each.config, len(each.ids), self._at_a_time)
                with says_if_slow("warming up"):
                    warm_up([("", self._generator, each.config)], each.ids, self._at_a_time)

    def _measured(self, asked: Sequence[_Asked]) -> Iterator[tuple[int, Record]]:
        """Place and record of each answer; those that are asked for by the same settings share batches."""
        for _, alike in groupby(sorted(asked, key=_Asked.settings), key=_Asked.settings):
            first, *rest = alike
            questions = [Question(each.place, each.ids, self._seed + each.number) for each in (first, *rest)]
            try:
                yield from measure_examples([("", self._generator, first.config)], questions, self._at_a_time)
            except RequestError as error:
                with named(asked[error.index].name, self._at_a_time):
                    raise

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

    def _answer(self, asked: _Asked, measured: Record) -> tuple[str, Record]:
        """The text that the harness wants, and all that is to be kept."""
        context, gen_kwargs = asked.request.args
        # The harness cuts the answers of its own model in the same way.
        answer = self.tok_decode(measured["tokens"])
        answer = postprocess_generated_text(answer, asked.config.stop_words or [], think_end_token=None)
        self.cache_hook.add_partial("generate_until", (context, gen_kwargs), answer)
        return answer, {
            "index": asked.place * self.world_size + self.rank,
            "task": asked.request.task_name,
            "doc_id": asked.request.doc_id,
            "prompt": context,
            **measured,
            "prediction": answer,
        }


class _Asked(NamedTuple):
    """A request as it is put to the model."""

    place: int  # among this rank's requests
    request: Instance
    repeat: int  # how often it stood among them before
    ids: list[int]
    config: GenerationConfig

    @property
    def name(self) -> str:
        return f"{self.request.task_name}, document {self.request.doc_id}"

    @property
    def number(self) -> int:
        """The same wherever the request stands, and on whatever rank."""
        request = self.request
        return zlib.crc32(f"{request.task_name} {request.doc_id} {request.idx} {self.repeat}".encode())

    def settings(self) -> str:
        return repr(self.config)
