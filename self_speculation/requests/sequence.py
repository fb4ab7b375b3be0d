"""One request in flight: ids, limits, logits processors, seed, streamer and times."""

from __future__ import annotations

import math
import time
from array import array
from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from self_speculation.backends.buffers import PREFIX_BLOCK
from self_speculation.backends.sampling import Sampler, noise_key
from self_speculation.config import GenerationConfig
from self_speculation.machine.transfers import AsyncRead, on_device
from self_speculation.requests.request import Request, as_list
from self_speculation.requests.results import DraftStats, GenerationStrategyResult, StopReason

_NOT_A_NUMBER = "the model's logits are not numbers (NaN): its weights are damaged, or need --dtype float32"
_NO_TOKEN = "no token can be picked: the largest logit is infinite; do logits processors forbid every token?"


class Failure(NamedTuple):
    """The first error of a round. It is raised only if the output reaches this position."""

    position: int  # of the failed token: 0 is the first one after the output
    error: Exception


class StopConditions:
    """The conditions that end an output: length, end ids, checks and criteria.

    Attributes:
        max_length: the most tokens of prompt and output.
        end_ids: end the output.
        criteria: of transformers.
    """

    def __init__(self, request: Request, config: GenerationConfig, num_prompt: int, context: int) -> None:
        self._max_steps = config.max_steps
        self.max_length = min(num_prompt + config.max_steps, context)
        self.end_ids = {*as_list(request.eos_token_ids), *(config.stop_token_ids or [])}
        self.criteria = as_list(request.stopping_criteria)
        self._checks = as_list(request.stop_checks)

    def reached_by(self, sequence: Sequence, logits: Tensor | None, index: int) -> StopReason | None:
        """Why the output ends after the last token; None: it goes on.

        Args:
            logits: [N, V] processed; row `index` belongs to the last token. None: there are no criteria.
        """
        tokens = sequence.output_ids
        if tokens[-1] in self.end_ids:
            return "eos"
        for check in self._checks:
            if check(tokens):
                return "stop_word"
        for met in self.criteria:
            # One by one: only a result on a GPU has to be waited for.
            assert logits is not None
            if torch.as_tensor(met(sequence.history(), logits[index : index + 1])).any():
                return "stopping_criteria"
        if sequence.length < self.max_length:
            return None
        return "max_steps" if len(tokens) == self._max_steps else "context"


class TokenStream:
    """Hands tokens to a streamer, if there is one, and drafted tokens to a streamer that can delete them."""

    def __init__(self, streamer: BaseStreamer | None) -> None:
        self._streamer = streamer
        self.shows_drafts = hasattr(streamer, "delete")
        self._num_shown = 0  # tokens of the draft

    def show_draft(self, ids: list[int]) -> None:
        """Show the ids of a draft that are not shown yet."""
        assert self._streamer is not None
        if new := ids[self._num_shown :]:
            self._streamer.put(torch.tensor(new), is_draft=True)
        self._num_shown = len(ids)

    def put(self, tokens: abc.Sequence[int]) -> None:
        """Delete the draft that is shown, and stream decided tokens."""
        if self._streamer is None:
            return
        num_shown = self._num_shown
        self._num_shown = 0
        if num_shown:
            self._streamer.delete(num_shown, is_draft=True)
        if tokens:
            self._streamer.put(torch.tensor(tokens))

    def end(self) -> None:
        """Delete the draft that is shown, and end the stream."""
        self.put(())
        if self._streamer is not None:
            self._streamer.end()


class Sequence:
    """Prompt and output of one request, on the host.

    The parts: ids; `stop_conditions`, which end the output; `sampler` and `noise_key`, which pick tokens;
    logits processors; the stream; counts and times.

    The prompt's ids are on the device, too. For processors and criteria the output is there as well, and for
    processors the draft.

    Args:
        request: in token ids. `request.config` overrides `config` of the batch.
        context: the most tokens of prompt and output, more than the prompt has.
        has_drafts: whether to count drafts.

    Raises ValueError for a prompt without tokens.
    """

    def __init__(
        self,
        request: Request,
        config: GenerationConfig,
        context: int,
        device: torch.device,
        request_id: Any = None,
        has_drafts: bool = False,
    ) -> None:
        self._started = time.perf_counter()
        self._first_token_at: float | None = None
        self.request_id = request_id
        self._request = request
        self.prompt_ids = request.prompt_ids
        if not self.prompt_ids:
            raise ValueError("the prompt has no tokens")
        config = request.config or config
        self.output_ids: list[int] = []  # of the output, with an end id
        self.stop_conditions = StopConditions(request, config, len(self.prompt_ids), context)
        self._stream = TokenStream(request.streamer)
        self.stop_reason: StopReason | None = None
        self.error: Exception | None = None
        self._failure: Failure | None = None  # of this round
        self.is_damaged = False  # keys and values may be NaN, also after the end
        self.sampler = Sampler.of(config)
        self._seed = request.seed or 0
        if request.seed is None and not self.sampler.greedy:
            self._seed = int(torch.randint(2**63 - 1, ()))
        self.num_cached = 0  # tokens of the prompt that were in the KV cache already
        self.num_computed = 0  # tokens of the prompt that are in it now, until the sequence joins the batch
        self.slot: int | None = None  # of the KV cache; `PrefixCache` sets it
        self.draft_stats = DraftStats() if has_drafts else None
        self.processors = request.processors(config)
        self._has_grammar = any(hasattr(processor, "masked") for processor in self.processors)
        # This round's draft: each token as an id, or as a read of several tokens and an index in it.
        self._drafted: list[int | tuple[AsyncRead, int]] = []
        self._ids = torch.empty(1, self.stop_conditions.max_length + 1, dtype=torch.long, device=device)
        self._ids[0, : len(self.prompt_ids)] = on_device(self.prompt_ids, device)

    @property
    def prediction(self) -> abc.Sequence[int]:
        """The ids that the output is expected to resemble."""
        prediction = self._request.prediction or ()
        assert not isinstance(prediction, str), "a strategy takes token ids"
        return prediction

    @cached_property
    def prompt_blocks(self) -> list[bytes]:
        """The ids of each block of PREFIX_BLOCK before the last token of the prompt. Bytes are compared at
        once.
        """
        ends = range(PREFIX_BLOCK, len(self.prompt_ids), PREFIX_BLOCK)
        return [array("q", self.prompt_ids[end - PREFIX_BLOCK : end]).tobytes() for end in ends]

    @property
    def num_uncomputed(self) -> int:
        """Tokens of the prompt that are not in the KV cache."""
        return len(self.prompt_ids) - self.num_computed

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated; 0: finished."""
        return 0 if self.stop_reason or self.error else self.stop_conditions.max_length - self.length

    @contextmanager
    def isolating_errors(self) -> Iterator[None]:
        """An error in this block becomes the error of this sequence and ends it. Other rows go on."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def check(self, largest: abc.Sequence[float]) -> None:
        """Record a `Failure` at the first position of this round whose largest logit is NaN or -inf, or inf
        where tokens are sampled.
        """
        self.is_damaged = self.is_damaged or any(map(math.isnan, largest))
        end = None if self._failure is None else self._failure.position
        for position, number in enumerate(largest[:end]):
            # Greedy decoding takes the first one of several infinite logits.
            if math.isnan(number) or number == -math.inf or (number == math.inf and not self.sampler.greedy):
                why = _NOT_A_NUMBER if math.isnan(number) else _NO_TOKEN
                self._failure = Failure(position, FloatingPointError(why))
                break

    @property
    def length(self) -> int:
        """Tokens of the prompt and the output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def last_id(self) -> int:
        """The last token of prompt and output."""
        return self.output_ids[-1] if self.output_ids else self.prompt_ids[-1]

    @property
    def all_ids(self) -> list[int]:
        """The ids of prompt and output."""
        return [*self.prompt_ids, *self.output_ids]

    def all_ids_from(self, position: int) -> list[int]:
        """`all_ids[position:]`, without a copy of the rest."""
        num_prompt = len(self.prompt_ids)
        return [*self.prompt_ids[position:], *self.output_ids[max(0, position - num_prompt) :]]

    def noise_key(self, offset: int) -> int:
        """The key of the noise of position 0, 1, ... after the output."""
        return noise_key(self._seed, len(self.output_ids) + offset)

    def history(self, num_drafted: int = 0) -> Tensor:
        """[1, prompt + output + draft] ids. Without processors and criteria only the prompt is valid."""
        return self._ids[:, : self.length + num_drafted]

    def process(self, logits: Tensor, num_drafted: int) -> Tensor:
        """Process logits [n, V], one row [1, V] at a time; the result is in fp32.

        Row i follows the history and `num_drafted + i` drafted tokens. If a processor raises, the row stays
        unprocessed, and the round has a `Failure`.
        """
        logits = logits.float()
        if not (self.processors and len(logits)):
            return logits
        self._failure = None  # of a draft: verification processes the same positions
        processed = logits.clone()  # processors may change what they are given
        for i, position in enumerate(range(num_drafted, num_drafted + len(logits))):
            drafted = self._drafted_ids(position) if self._has_grammar else []
            scores = logits[i : i + 1]
            try:
                for processor in self.processors:
                    if hasattr(processor, "masked"):
                        scores = processor.masked([*self.output_ids, *drafted], scores)
                    else:
                        scores = processor(self.history(position), scores)
                processed[i] = scores
            except Exception as error:
                self._failure = self._failure or Failure(position, error)
        return processed

    def draft_limit(self, k: int) -> int:
        """The most tokens to draft, at most k. A round outputs up to one token more."""
        return max(0, min(k, self.remaining - 1)) if self._request.drafts else 0

    @property
    def reads_draft(self) -> bool:
        """Whether the host needs the next drafted token: for a grammar, or to show it."""
        return self._has_grammar or self._stream.shows_drafts

    def write_drafted(
        self, tokens: Tensor, position: int, drafted: abc.Iterable[int | tuple[AsyncRead, int]]
    ) -> None:
        """Write drafted tokens [n] from position 0, 1, ... on if processors read them.

        Args:
            drafted: each token as an id, or as a read and an index in it; none: the host needs no id.
        """
        if self.processors:
            start = self.length + position
            self._ids[0, start : start + len(tokens)] = tokens
        self._drafted.extend(drafted)

    def _drafted_ids(self, count: int | None = None) -> list[int]:
        """The first ids of this round's draft, by the reads that are still to come."""
        return [
            int(each[0].wait()[0][each[1]]) if isinstance(each, tuple) else each
            for each in self._drafted[:count]
        ]

    def show_draft(self) -> None:
        """Stream what is drafted and not shown yet, up to an end id."""
        if self._drafted and self._stream.shows_drafts:
            ids = self._drafted_ids()  # an error of the device is not the streamer's
            with self.isolating_errors():
                end_ids = self.stop_conditions.end_ids
                self._stream.show_draft([*takewhile(lambda id_: id_ not in end_ids, ids)])

    def allowed(self, draft: list[int]) -> list[int]:
        """The first tokens of a draft, up to one that a processor with `count_allowed` forbids."""
        for processor in self.processors:
            if draft and hasattr(processor, "count_allowed"):
                draft = draft[: processor.count_allowed(self.output_ids, draft)]
        return draft

    def commit(
        self,
        tokens: abc.Sequence[int],
        logits: Tensor | None,
        first: int = 0,
        num_drafted: int | None = None,
        source: str | None = None,
    ) -> None:
        """Append tokens to the output, up to the one that ends it or to a failure.

        Args:
            tokens: the accepted ones of a draft and one more.
            logits: [N, V] processed; row `first` belongs to the first of the tokens. Only criteria read rows:
                to slice one takes the host longer than all else here. None: there are no criteria.
            num_drafted: tokens that `source` drafted in this round; None: no draft was verified.
        """
        failure = self._failure
        self._failure = None
        self._drafted = []
        if not self.remaining:
            return
        before = len(self.output_ids)
        with self.isolating_errors():
            for i, token in enumerate(tokens):
                if failure is not None and i == failure.position:
                    self.error = failure.error
                    break
                # Accepted tokens are there already if processors have read them.
                is_there = self.processors and i < len(tokens) - 1
                if (self.processors or self.stop_conditions.criteria) and not is_there:
                    self._ids[0, self.length] = token
                self.output_ids.append(token)
                reason = self.stop_conditions.reached_by(self, logits, first + i)
                self.stop_reason = self.stop_reason or reason  # a check may have cancelled this sequence
                if self.stop_reason:
                    break
        new = self.output_ids[before:]
        if self.draft_stats is not None and num_drafted is not None:
            self.draft_stats.add(source, num_drafted, accepted=len(tokens) - 1, emitted=len(new))
        self._first_token_at = self._first_token_at or time.perf_counter()
        with self.isolating_errors():
            self._stream.put(new[:-1] if self.stop_reason == "eos" else new)

    def result(self) -> GenerationStrategyResult | Exception:
        """The result, or the error of processors, criteria, streamer or logits."""
        finished = time.perf_counter()
        with self.isolating_errors():
            self._stream.end()
        if self.error is not None:
            return self.error
        first_token_at = self._first_token_at or finished
        ended_by_id = self.stop_reason == "eos"
        return GenerationStrategyResult(
            predicted_tokens=self.output_ids[:-1] if ended_by_id else self.output_ids,
            acceptance_rate=self.draft_stats.acceptance_rate if self.draft_stats else None,
            stop_reason=self.stop_reason,
            end_token_id=self.output_ids[-1] if ended_by_id else None,
            num_prompt_tokens=len(self.prompt_ids),
            num_cached_tokens=self.num_cached,
            num_decode_tokens=max(0, len(self.output_ids) - 1),
            prefill_time=first_token_at - self._started,
            decode_time=finished - first_token_at,
            draft_stats=self.draft_stats,
        )
