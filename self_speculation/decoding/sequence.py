"""One request in flight: its ids, stop conditions, logits processors, streamer and times."""

from __future__ import annotations

import math
import time
from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from self_speculation.config import GenerationConfig
from self_speculation.decoding.request import Request, as_list
from self_speculation.decoding.sampling import Sampler
from self_speculation.results import DraftStats, GenerationStrategyResult, StopReason
from self_speculation.transfers import on_device

_NOT_A_NUMBER = "the model's logits are not numbers (NaN): its weights are damaged, or need --dtype float32"
_NO_DISTRIBUTION = (
    "no token can be drawn: the largest logit is infinite, as where logits processors leave -inf alone"
)


class Sequence:
    """Prompt, output and draft, in this order in one buffer on the device.

    Args:
        request: in token ids. Its own config overrides `config`, that of the batch.
        context: the most tokens of prompt and output, more than the prompt has.
        has_drafts: whether to count drafts.
        started: `time.perf_counter` at its start; None: now.

    Raises ValueError for a prompt without tokens.
    """

    def __init__(
        self,
        request: Request,
        config: GenerationConfig,
        context: int,
        device: torch.device,
        key: Any = None,
        has_drafts: bool = False,
        started: float | None = None,
    ) -> None:
        self._started = time.perf_counter() if started is None else started
        self._first_token_at: float | None = None
        config, prompt = request.config or config, request.ids
        room = context - len(prompt)
        if not prompt:
            raise ValueError("the prompt has no tokens")
        self.key, self.prompt, self.prediction = key, [*prompt], request.predicted_ids
        self.max_length = len(prompt) + min(config.max_steps, room)
        self._at_limit: StopReason = "max_steps" if config.max_steps <= room else "context"
        self._end_ids = {*as_list(request.eos_token_ids), *(config.stop_token_ids or [])}
        self._ends_text, self._criteria = as_list(request.ends_text), as_list(request.stopping_criteria)
        self.tokens: list[int] = []  # of the output, with an end id
        self.stop_reason: StopReason | None = None
        self.error: Exception | None = None
        self.is_damaged = False  # its keys and values may be NaN, beyond its end, too
        # Errors of this round by position after the output. They count if the output gets there; most
        # positions are rejected drafts.
        self._errors: dict[int, Exception] = {}
        self.sampler = Sampler.of(config)
        self.generator: torch.Generator | None = None  # of random numbers; None: torch's own
        if request.seed is not None:
            self.generator = torch.Generator(device).manual_seed(request.seed)
        self.wants_drafts = request.config is None or config.generation_strategy != "autoregressive"
        self.num_cached = 0  # tokens of the prompt that were in the KV cache already
        self.num_computed = 0  # tokens of the prompt that are in it now, until the sequence joins the batch
        self.slot: int | None = None  # of the KV cache; set by its owner, `PrefixCache`
        self.draft_stats = DraftStats() if has_drafts else None
        self._ids = torch.empty(1, self.max_length + 1, dtype=torch.long, device=device)
        self._ids[0, : len(prompt)] = on_device(prompt, device)
        self._processors = LogitsProcessorList(request.processors(config))
        self.ids_are_read = bool(self._processors or self._criteria)  # on the device
        self._streamer = request.streamer
        self._drafts_shown = 0
        self._draft_ended = False

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated; 0: finished."""
        return 0 if self.stop_reason or self.error else self.max_length - self.length

    def check(self, largest: abc.Sequence[float]) -> None:
        """Note the positions of this round whose largest logit is invalid."""
        self.is_damaged = self.is_damaged or any(map(math.isnan, largest))
        for position, number in enumerate(largest):
            if math.isnan(number) or (math.isinf(number) and not self.sampler.greedy):
                why = _NOT_A_NUMBER if math.isnan(number) else _NO_DISTRIBUTION
                self._errors.setdefault(position, FloatingPointError(why))

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Errors of criteria and streamer end this sequence only."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    @property
    def length(self) -> int:
        """Tokens of the prompt and the output."""
        return len(self.prompt) + len(self.tokens)

    @property
    def ids(self) -> list[int]:
        """Of the prompt and the output."""
        return [*self.prompt, *self.tokens]

    def ids_from(self, position: int) -> list[int]:
        """`ids[position:]`, without a copy of the rest."""
        num_prompt = len(self.prompt)
        return [*self.prompt[position:], *self.tokens[max(0, position - num_prompt) :]]

    def history(self, num_drafted: int = 0) -> Tensor:
        """[1, prompt + output + draft] ids. Only the prompt is valid without processors and criteria."""
        return self._ids[:, : self.length + num_drafted]

    @property
    def has_processors(self) -> bool:
        return bool(self._processors)

    def process(self, logits: Tensor, num_drafted: int, count: int) -> Tensor:
        """[n, V] logits in fp32, the first `count` of them processed, one row [1, V] at a time.

        Row i follows the history with `num_drafted + i` drafted tokens. Where processors raise, it stays
        unprocessed; `commit` raises the error if the output gets there.
        """
        logits = logits.float()
        if not self._processors or not count:
            return logits
        processed = logits.clone()  # processors may change what they are given
        for i, position in enumerate(range(num_drafted, num_drafted + count)):
            self._errors.pop(position, None)
            try:
                processed[i] = self._processors(self.history(position), logits[i : i + 1])
            except Exception as error:
                self._errors[position] = error
        return processed

    def write_drafted(self, token: Tensor, position: int) -> None:
        """Write the draft's token at position 0, 1, ... if processors read it."""
        if self._processors:
            self._ids[0, self.length + position] = token

    def allowed(self, draft: list[int]) -> list[int]:
        """The first tokens of a draft, up to one that a processor with `count_allowed` forbids."""
        for processor in self._processors:
            if draft and hasattr(processor, "count_allowed"):
                draft = draft[: processor.count_allowed(self.tokens, draft)]
        return draft

    @property
    def shows_draft(self) -> bool:
        """Whether to stream the next drafted token."""
        return hasattr(self._streamer, "delete") and not self._draft_ended

    def show_drafted(self, id_: int) -> None:
        self._draft_ended = id_ in self._end_ids
        if not self._draft_ended:
            self._drafts_shown += 1
            with self._own_errors():
                self._streamer.put(torch.tensor([id_]), is_draft=True)

    def commit(
        self, tokens: abc.Sequence[int], scores: Tensor, num_drafted: int = 0, source: str = ""
    ) -> None:
        """Append tokens to the output, up to the one that ends it or to a position with an error.

        Args:
            tokens: the accepted ones of a draft and one more.
            scores: [n or more, V] their processed logits.
            num_drafted: tokens that `source` drafted in this round.
        """
        errors, self._errors, taken = self._errors, {}, 0
        if self.error is not None:  # its streamer failed at a draft
            return
        with self._own_errors():
            while taken < len(tokens) and not self.stop_reason:
                if taken in errors:
                    self.error = errors[taken]
                    break
                # Accepted tokens are there already if processors have read them.
                if self.ids_are_read and not (self._processors and taken < len(tokens) - 1):
                    self._ids[0, self.length] = tokens[taken]
                self.tokens.append(tokens[taken])
                self.stop_reason = self._stops(scores[taken : taken + 1])
                taken += 1
            if self.draft_stats is not None and source:
                self.draft_stats.add(source, num_drafted, accepted=len(tokens) - 1, emitted=taken)
            self._first_token_at = self._first_token_at or time.perf_counter()
            if self._streamer is not None:
                self._stream(tokens[: taken - 1 if self.stop_reason == "eos" else taken])

    def _stops(self, scores: Tensor) -> StopReason | None:
        """Why the output ends after its last token, of these processed logits [1, V]; None: it goes on."""
        if self.tokens[-1] in self._end_ids:
            return "eos"
        if any(ends(self.tokens) for ends in self._ends_text):
            return "stop_word"
        # One by one: only a result on a GPU has to be waited for.
        if any(bool(torch.as_tensor(met(self.history(), scores)).any()) for met in self._criteria):
            return "stopping_criteria"
        return self._at_limit if self.length >= self.max_length else None

    def result(self) -> GenerationStrategyResult | Exception:
        """The result, or the error of its processors, criteria, streamer or logits."""
        finished = time.perf_counter()
        with self._own_errors():
            if self._streamer is not None:
                self._stream(())  # deletes a draft that is still shown
                self._streamer.end()
        if self.error is not None:
            return self.error
        first_token_at = self._first_token_at or finished
        ended_by_id = self.stop_reason == "eos"
        return GenerationStrategyResult(
            predicted_tokens=self.tokens[:-1] if ended_by_id else self.tokens,
            acceptance_rate=self.draft_stats.acceptance_rate if self.draft_stats else None,
            stop_reason=self.stop_reason,
            end_token_id=self.tokens[-1] if ended_by_id else None,
            num_prompt_tokens=len(self.prompt),
            num_cached_tokens=self.num_cached,
            num_decode_tokens=max(0, len(self.tokens) - 1),
            prefill_time=first_token_at - self._started,
            decode_time=finished - first_token_at,
            draft_stats=self.draft_stats,
        )

    def _stream(self, tokens: abc.Sequence[int]) -> None:
        if self._drafts_shown:
            self._streamer.delete(self._drafts_shown, is_draft=True)
        self._drafts_shown, self._draft_ended = 0, False
        if tokens:
            self._streamer.put(torch.tensor(tokens))
