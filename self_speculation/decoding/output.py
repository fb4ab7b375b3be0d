"""One generation's tokens: the history that processors and stopping see, the streamer's feed, and the clock.

Shared by the strategies, so that both process logits, stop, stream and count alike. Knows nothing of layers
or caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from self_speculation.decoding.sampling import Sampler
from self_speculation.decoding.stopping import StopConditions
from self_speculation.decoding.tally import Tally
from self_speculation.results import GenerationStrategyResult, StopReason

_NOT_A_NUMBER = "the model's logits are not numbers (NaN): its weights are damaged, or need --dtype float32"


class Reading:
    """One read from the device: all of these numbers, ids among them; fp32 holds ids below 2^24 exactly.

    A GPU copies them when it comes to it, and can be given more to do before anybody waits for them.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        self._values = torch.cat([part.flatten().float() for part in numbers])
        self._numbers: list[float] | None = None
        self._copied: torch.cuda.Event | None = None
        if self._values.device.type == "cuda":
            on_host = torch.empty(self._values.shape, dtype=torch.float32, pin_memory=True)
            self._values = on_host.copy_(self._values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> list[float]:
        """The numbers; the second time nothing is waited for."""
        if self._numbers is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._numbers = self._values.tolist()
        return self._numbers


def read(numbers: Sequence[Tensor], logits: Tensor) -> list[float]:
    """These numbers at once, by one read.

    Args:
        logits: [n, V] that they come from.

    Raises:
        FloatingPointError: the logits are not numbers. The last row tells: what is no number in the cache
            makes all logits after it no numbers.
    """
    damaged, *values = Reading([logits[-1].isnan().any(), *numbers]).wait()
    if damaged:
        raise FloatingPointError(_NOT_A_NUMBER)
    return values


class Output:
    """Prompt and generated ids in one buffer on the device, with room for a draft after what is decided.

    Args:
        prompt: the prompt's ids, at least one.
        device: where the model takes its ids.
        stop: decides after each token whether the output goes on.
        processors: transformers logits processors.
        streamer: `put(ids)` and `end()`; one that also has `delete` is shown the drafts.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        device: torch.device,
        stop: StopConditions,
        processors: Sequence[Callable] | None = None,
        streamer: Any = None,
    ) -> None:
        self._started = time.perf_counter()
        self._first_token_at: float | None = None
        self.prompt = list(prompt)
        self.max_length = len(prompt) + stop.max_tokens
        self.tokens: list[int] = []  # generated and decided, an end id included
        self.stop_reason: StopReason | None = None
        self.tally: Tally | None = None  # of the drafts; None until there are some
        self._ids = torch.empty(1, self.max_length + 1, dtype=torch.long, device=device)
        self._ids[0, : len(prompt)] = torch.tensor(prompt, device=device)
        self._stop = stop
        self._processors = LogitsProcessorList(processors or [])
        self._streamer = streamer
        self._shows_drafts = hasattr(streamer, "delete")
        self._drafts_shown = 0
        self._draft_ended = False

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated; 0 once the output has ended."""
        return 0 if self.stop_reason else self._stop.max_tokens - len(self.tokens)

    @property
    def length(self) -> int:
        """Of the history: prompt and decided tokens."""
        return len(self.prompt) + len(self.tokens)

    def history(self, num_drafted: int = 0) -> Tensor:
        """[1, prompt + output + drafts] ids, a view."""
        return self._ids[:, : self.length + num_drafted]

    def last(self, num_drafted: int = 0) -> Tensor:
        """[1, 1] the last id of the history, a view."""
        return self.history(num_drafted)[:, -1:]

    def drafted(self, num_drafted: int) -> Tensor:
        """[k] the ids proposed after the decided ones, a view."""
        return self.history(num_drafted)[0, self.length :]

    def process(self, logits: Tensor, num_drafted: int = 0) -> Tensor:
        """Apply the logits processors.

        Args:
            logits: [n, V]; row i is for the position after the history with `num_drafted + i` drafted
                tokens.

        Returns:
            [n, V], in fp32 when there are processors. Each row went through them by itself, as [1, V].
        """
        if not self._processors:
            return logits
        rows = logits.float().split(1)
        return torch.cat([self._processors(self.history(num_drafted + i), row) for i, row in enumerate(rows)])

    def place(self, token: Tensor, position: int) -> None:
        """Write token [1] after the decided ones, at draft position 0, 1, ..."""
        self.history(position + 1)[0, -1:] = token

    def propose(self, token: Tensor, position: int, confidence: Tensor | None = None) -> Reading | None:
        """Place a drafted token, and show it if drafts are shown.

        One read from the device where drafts are shown or there is a confidence; else none.

        Args:
            token: [1]
            confidence: [1], in fp32, the token's probability, where it decides how the draft goes on.

        Returns:
            The read, if there is one: of the token, and of the confidence.
        """
        self.place(token, position)
        # Whatever a draft goes on with after an end id will never be output.
        shown = self._shows_drafts and not self._draft_ended
        if confidence is None and not shown:
            return None
        reading = Reading([token] if confidence is None else [token, confidence])
        if shown:
            id_ = int(reading.wait()[0])
            self._draft_ended = id_ in self._stop.end_ids
            if not self._draft_ended:
                self._streamer.put(torch.tensor([id_]), is_draft=True)
                self._drafts_shown += 1
        return reading

    def emit(self, logits: Tensor, sampler: Sampler) -> None:
        """Pick one token by logits [1, V] and decide on it; one read from the device."""
        logits = self.process(logits)
        token = sampler(logits).tokens  # [1]
        self.place(token, 0)
        (id_,) = read([token], logits)
        self.commit([int(id_)], logits)

    def commit(self, tokens: Sequence[int], scores: Tensor, drafted: int = 0, source: str = "") -> None:
        """Decide on tokens, up to the one that ends the output.

        Args:
            tokens: n ids, which stand at draft positions 0..n-1.
            scores: [>= n, V] the processed logits that they came from.
            drafted: tokens that were drafted by `source` in the round of which these come.
        """
        taken = 0
        while taken < len(tokens) and not self.stop_reason:
            self.tokens.append(tokens[taken])
            self.stop_reason = self._stop.reason(self.tokens, self.history(), scores[taken : taken + 1])
            taken += 1
        if self.tally is not None:
            self.tally.add(source, drafted, accepted=len(tokens) - 1, emitted=taken)
        if self._first_token_at is None:
            self._first_token_at = time.perf_counter()
        if self._streamer is not None:
            self._stream(tokens[: taken - 1 if self.stop_reason == "eos" else taken])

    def result(self) -> GenerationStrategyResult:
        """What there is to report, once the output has ended."""
        finished = time.perf_counter()
        if self._streamer is not None:
            self._streamer.end()
        assert self._first_token_at is not None
        ended_by_id = self.stop_reason == "eos"
        tally = self.tally
        return GenerationStrategyResult(
            predicted_tokens=self.tokens[:-1] if ended_by_id else self.tokens,
            acceptance_rate=tally and tally.acceptance_rate,
            stop_reason=self.stop_reason,
            end_token_id=self.tokens[-1] if ended_by_id else None,
            num_prompt_tokens=len(self.prompt),
            num_decode_tokens=len(self.tokens) - 1,
            prefill_time=self._first_token_at - self._started,
            decode_time=finished - self._first_token_at,
            num_verifications=tally and tally.num_verifications,
            judged_by_position=tally and tally.judged_by_position,
            drafted_by_position=tally and tally.drafted_by_position,
            accepted_by_position=tally and tally.accepted_by_position,
            drafts_by_source=tally and tally.by_source,
        )

    def _stream(self, tokens: Sequence[int]) -> None:
        if self._drafts_shown:
            self._streamer.delete(self._drafts_shown, is_draft=True)
        self._drafts_shown, self._draft_ended = 0, False
        if tokens:
            self._streamer.put(torch.tensor(tokens))
