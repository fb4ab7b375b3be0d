"""A model of lm-evaluation-harness that answers by a generation strategy of this library.

Log-likelihoods come from the harness's own Hugging Face model; from an early exit where that is what is
evaluated; and from our layers where weights in 16 bits are multiplied in float32. Knows nothing of flags or
files.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from tqdm import tqdm

from measures.timed_runs import measure_examples, warm_up
from runs import ranks
from runs.failures import failed
from runs.records import Record
from runs.status import says_if_slow
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, Request
from self_speculation.model.families import attended_length
from self_speculation.model.fused_layers import activation_dtype
from self_speculation.model.model_runner import ModelRunner, forward_early
from self_speculation.model.whole_texts import exit_logits, hidden_after_each_layer

# What may be asked of generation; the harness has four names for the number of tokens.
_NUMBER_OF_TOKENS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
_SUPPORTED = {"until", "do_sample", "temperature", "top_k", "top_p", "no_repeat_ngram_size"}
_CHANGES_NOTHING = {"num_beams": 1}


class UnsupportedError(ValueError):
    """A request asks for what this model cannot do."""


def request_config(gen_kwargs: dict[str, Any], config: GenerationConfig, of_model: Any) -> GenerationConfig:
    """`config`, changed to what a request asks for by the harness's names.

    Args:
        of_model: has the top_k and top_p of requests that ask for none, as transformers' `generate` does.

    Raises:
        UnsupportedError: names arguments that cannot be honoured, or a value that is out of range.
    """
    known = _SUPPORTED | _NUMBER_OF_TOKENS
    wrong = {k: v for k, v in gen_kwargs.items() if k not in known and (k, v) not in _CHANGES_NOTHING.items()}
    if wrong:
        given = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise UnsupportedError(f"{given}: supported are max_gen_toks, {', '.join(sorted(_SUPPORTED))}")
    top_k, top_p = getattr(of_model, "top_k", None), getattr(of_model, "top_p", None)
    try:
        asked = normalize_gen_kwargs(gen_kwargs)
        return replace(
            config,
            max_steps=asked["max_gen_toks"],
            sample=bool(asked["do_sample"]),
            temperature=asked.get("temperature", 1.0),
            top_k=asked.get("top_k", 50 if top_k is None else top_k) or 0,
            top_p=asked.get("top_p", 1.0 if top_p is None else top_p),
            no_repeat_ngram_size=asked.get("no_repeat_ngram_size") or None,
            stop_words=[str(text) for text in asked["until"] if text not in (None, "")],
        )
    except (ValueError, TypeError) as error:
        raise UnsupportedError(str(error)) from error


class HarnessModel(HFLM):
    """The model that the harness asks for log-likelihoods and answers.

    `has_begun` is True from the first pass on, and `records` then fills: how each answer came about.

    Args:
        generator: model, tokenizer and strategy.
        config: exit layer, draft length and whatever else a request does not have.
        seed: of sampled answers; each depends on this, its document and its number alone.
        batch_size: as the harness has it: a number, auto or auto:N.
        max_batch_size: the most that auto tries.
        accelerator: where several processes share the documents.
    """

    def __init__(
        self,
        generator: HuggingfaceLlamaGenerator,
        config: GenerationConfig,
        seed: int,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self._generator, self._settings, self._seed = generator, config, seed
        early = config.generation_strategy == "autoregressive" and config.exit_layer != -1
        self._exit_layer = config.exit_layer if early else None
        self._room = attended_length(generator.model.config)
        self._is_widened = activation_dtype(generator.model) != generator.model.dtype
        self.records: list[Record] = []
        self.has_begun = False
        logging.disable(logging.WARNING)  # that a loaded model must not share documents with other processes
        super().__init__(
            pretrained=generator.model,
            tokenizer=generator.tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size or 64,  # as in the harness
            backend="causal",
            max_length=self._room if early else None,
        )
        logging.disable(logging.NOTSET)
        if accelerator is not None:  # the harness leaves this to us for a model that is loaded already
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """[B, T] ids, padded on the right -> [B, T, V] logits of the full model or of the early exit."""
        self.has_begun = True
        if self._is_widened:  # of which the layers of transformers know nothing
            runner = ModelRunner(self.model, inps.shape[1], inps.shape[1], num_rows=len(inps))
            runner.cache.clear(len(inps))
            with torch.inference_mode():
                return forward_early(
                    runner, inps, self._exit_layer or len(runner.layers), inps.shape[1]
                ).logits
        if self._exit_layer is None:
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            states = hidden_after_each_layer(self.model, inps)
            return exit_logits(self.model, next(islice(states, self._exit_layer - 1, None)))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As in the harness, with one bar for all texts in place of one for each batch of their windows."""
        with tqdm(desc="windows of texts", disable=disable_tqdm or self.rank != 0) as self._windows:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if override_bs is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm)
        found = super()._loglikelihood_tokens(requests, True, override_bs)  # of a rolling log-likelihood
        self._windows.update(len(requests))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request, by its own generation arguments.

        Raises:
            UnsupportedError: names the task and what it asks for; nothing has been generated by then.
            Failed: names the document at which there was not enough memory.
        """
        asked, seen = [], Counter[int]()
        for place, request in enumerate(requests):
            asked.append(self._asked(place, request, seen[id(request)]))
            seen[id(request)] += 1
        self.has_begun = True
        answers: dict[int, str] = {}
        tokens, seconds = 0, 0.0
        with tqdm(total=len(asked), desc="answers", disable=disable_tqdm or self.rank != 0) as bar:
            for place, record in self._measured(asked):
                answers[place] = self._answer(asked[place], record)
                tokens, seconds = tokens + record["num_tokens"], seconds + record["wall_time"]
                bar.set_postfix_str(f"{tokens / seconds:.1f} tokens/s{ranks.alone()}", refresh=False)
                bar.update()
        return [answers[place] for place in range(len(asked))]

    def _asked(self, place: int, request: Instance, repeat: int) -> _Asked:
        """A request with its settings; its prompt is cut on the left where the context has no room for it."""
        context, gen_kwargs = request.args
        try:
            config = request_config(gen_kwargs, self._settings, self.model.generation_config)
            if (room := self._room - config.max_steps) < 1:
                raise UnsupportedError(
                    f"max_gen_toks {config.max_steps}: must be below the {self._room} positions of the "
                    "model, --max_steps lowers it"
                )
        except UnsupportedError as error:
            raise UnsupportedError(f"{request.task_name} asks for {error}") from error
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(list(config.stop_words or []), eos)
        ids = self.tok_batch_encode([context], left_truncate_len=room)[0][0].tolist()
        config = replace(config, stop_words=[text for text in until if text])
        return _Asked(place, request, repeat, ids, config)

    def _measured(self, asked: Sequence[_Asked]) -> Iterator[tuple[int, Record]]:
        """Place and record of each answer; those that are asked for by the same settings share batches."""
        # As everywhere in the harness, the largest batch that fits is looked for where --batch_size is auto.
        size = self._detect_batch_size() if self.batch_size == "auto" else self.batch_size
        for _, alike in groupby(sorted(asked, key=_Asked.settings), key=_Asked.settings):
            group = list(alike)
            config, longest = group[0].config, max(group, key=lambda each: len(each.ids))
            try:
                with says_if_slow("warming up"):
                    warm_up([("", self._generator, config)], longest.ids, size)
            except Exception as error:
                raise failed(longest.name, error, size) from error
            requests = {each.place: Request(each.ids, seed=self._seed + each.number) for each in group}
            for place, record in measure_examples([("", self._generator, config)], requests, size):
                if isinstance(record, Exception):
                    raise failed(asked[place].name, record, size) from record
                yield place, record

    def _answer(self, asked: _Asked, record: Record) -> str:
        """The text that the harness wants, cut as it cuts the answers of its own model."""
        answer = self.tok_decode(record["tokens"])
        answer = postprocess_generated_text(answer, asked.config.stop_words, think_end_token=None)
        self.cache_hook.add_partial("generate_until", asked.request.args, answer)
        if asked.repeat < (asked.request.repeats or 1):  # else the harness has padded this rank's share
            kind = {"task": asked.request.task_name, "greedy": asked.config.greedy}
            self.records.append({**kind, **record})
        return answer


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


@dataclass
class Loader:
    """Stands for the model where the harness asks for it by name: after it has found the tasks.

    All loaders are equal, so that the harness's registry lets one take the place of another.
    """

    load: Callable[..., HarnessModel] = field(compare=False)  # called with batch_size and max_batch_size
    model: HarnessModel | None = field(default=None, compare=False)

    def create_from_arg_obj(self, _arguments: dict[str, Any], sizes: dict[str, Any]) -> HarnessModel:
        """What the harness calls; the arguments are for its files alone."""
        self.model = self.load(sizes["batch_size"], sizes["max_batch_size"])
        return self.model
