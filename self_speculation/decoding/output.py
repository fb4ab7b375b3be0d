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

from self_speculation.decoding.stopping import StopConditions, StopReason

NOT_A_NUMBER = "the model's logits are not numbers (NaN): its weights are damaged, or need --dtype float32"


class Output:
    """Prompt and generated ids in one buffer on the device, with room for a draft behind what is decided.

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
        self.prompt_length = len(prompt)
        self.max_length = self.prompt_length + stop.max_tokens
        self.tokens: list[int] = []  # generated and decided, an end id included
        self.stop_reason: StopReason | None = None
        self._ids = torch.empty(1, self.max_length + 1, dtype=torch.long, device=device)
        self._ids[0, : self.prompt_length] = torch.tensor(prompt, device=device)
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

    def history(self, num_drafted: int = 0) -> Tensor:
        """[1, prompt + output + drafts] ids, a view."""
        return self._ids[:, : self.prompt_length + len(self.tokens) + num_drafted]

    def last(self, num_drafted: int = 0) -> Tensor:
        """[1, 1] the last id of the history, a view."""
        return self.history(num_drafted)[:, -1:]

    def drafted(self, num_drafted: int) -> Tensor:
        """[k] the ids proposed behind the decided ones, a view."""
        return self.history(num_drafted)[0, self.prompt_length + len(self.tokens) :]

    def process(self, logits: Tensor, num_drafted: int = 0) -> Tensor:
        """Apply the logits processors.

        Args:
            logits: [n, V]; row i is for the position behind the history with `num_drafted + i` drafted
                tokens.

        Returns:
            [n, V], in fp32 when there are processors. Each row went through them by itself, as [1, V].
        """
        if not self.tokens:
            self._check(logits)
        if not self._processors:
            return logits
        rows = logits.float().split(1)
        return torch.cat([self._processors(self.history(num_drafted + i), row) for i, row in enumerate(rows)])

    def place(self, token: Tensor, position: int) -> None:
        """Write token [1] behind the decided ones, at draft position 0, 1, ..."""
        self.history(position + 1)[0, -1:] = token

    def propose(self, token: Tensor, position: int) -> None:
        """Place a drafted token, and show it if drafts are shown."""
        self.place(token, position)
        # Whatever a draft goes on with after an end id will never be output.
        if self._shows_drafts and not self._draft_ended:
            self._draft_ended = int(token) in self._stop.end_ids
            if not self._draft_ended:
                self._streamer.put(token.cpu(), is_draft=True)
                self._drafts_shown += 1

    def commit(self, tokens: Sequence[int], scores: Tensor) -> int:
        """Decide on tokens, up to the one that ends the output.

        Args:
            tokens: n ids, which stand at draft positions 0..n-1.
            scores: [>= n, V] the processed logits that they came from.

        Returns:
            How many were taken, an end id included.
        """
        self._scores = scores
        taken = 0
        while taken < len(tokens) and not self.stop_reason:
            self.tokens.append(tokens[taken])
            self.stop_reason = self._stop.reason(self.tokens, self.history(), scores[taken : taken + 1])
            taken += 1
        if self._first_token_at is None:
            self._first_token_at = time.perf_counter()
        if self._streamer is not None:
            self._stream(tokens[: taken - 1 if self.stop_reason == "eos" else taken])
        return taken

    def result(self) -> dict[str, Any]:
        """What both strategies report, by the names of `GenerationStrategyResult`."""
        self._check(self._scores)
        finished = time.perf_counter()
        if self._streamer is not None:
            self._streamer.end()
        assert self._first_token_at is not None
        return {
            "predicted_tokens": self.tokens[:-1] if self.stop_reason == "eos" else self.tokens,
            "stop_reason": self.stop_reason,
            "end_token_id": self.tokens[-1] if self.stop_reason == "eos" else None,
            "num_prompt_tokens": self.prompt_length,
            "num_decode_tokens": len(self.tokens) - 1,
            "prefill_time": self._first_token_at - self._started,
            "decode_time": finished - self._first_token_at,
        }

    @staticmethod
    def _check(scores: Tensor) -> None:
        """The first and the last logits are looked at: NaN in the cache is in all from there on."""
        if scores.isnan().any():
            raise FloatingPointError(NOT_A_NUMBER)

    def _stream(self, tokens: Sequence[int]) -> None:
        if self._drafts_shown:
            self._streamer.delete(self._drafts_shown, is_draft=True)
        self._drafts_shown, self._draft_ended = 0, False
        if tokens:
            self._streamer.put(torch.tensor(tokens))
