"""What a generation results in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

StopReason = Literal["eos", "stop_word", "stopping_criteria", "max_steps", "context"]


class SourceCounts(NamedTuple):
    """What came of the drafts of one source."""

    rounds: int
    drafted: int  # tokens
    accepted: int  # tokens, as far as they were output


@dataclass(frozen=True)
class GenerationStrategyResult:
    """What a strategy generated and what it took; what speaks of drafts is None when autoregressive."""

    predicted_tokens: list[int]  # an end id is not included
    acceptance_rate: float | None = None  # accepted / drafted; also None when nothing was drafted
    stop_reason: StopReason | None = None
    end_token_id: int | None = None  # the id that ended the output, if one did
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt: those that an earlier answer had left in the cache
    num_decode_tokens: int = 0  # tokens after the first, an end id included
    prefill_time: float = 0.0  # seconds until the first token
    decode_time: float = 0.0  # seconds for all later ones
    num_verifications: int | None = None
    judged_by_position: tuple[int, ...] | None = None  # [i]: rounds that got as far as an i-th drafted token
    drafted_by_position: tuple[int, ...] | None = None  # [i]: rounds that drafted an i-th token
    accepted_by_position: tuple[int, ...] | None = None  # [i]: rounds whose i-th drafted token was output
    drafts_by_source: dict[str, SourceCounts] | None = None

    @property
    def num_drafted(self) -> int | None:
        return None if self.drafted_by_position is None else sum(self.drafted_by_position)

    @property
    def num_accepted(self) -> int | None:
        return None if self.accepted_by_position is None else sum(self.accepted_by_position)

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens per verification."""
        return self.num_decode_tokens / self.num_verifications if self.num_verifications else None

    @property
    def acceptance_by_position(self) -> tuple[float, ...] | None:
        """Share of the i-th drafted tokens that were accepted."""
        if self.drafted_by_position is None or self.accepted_by_position is None:
            return None
        pairs = zip(self.accepted_by_position, self.drafted_by_position, strict=True)
        return tuple(accepted / drafted for accepted, drafted in pairs)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of the whole prompt, what was in the cache included."""
        return self.num_prompt_tokens / self.prefill_time if self.prefill_time else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.num_decode_tokens / self.decode_time if self.num_decode_tokens else 0.0


@dataclass(frozen=True)
class GenerationResult:
    """Text, ids and times of one answer."""

    generation_strategy_result: GenerationStrategyResult
    decoded_prediction: str  # ends before a stop word
    num_tokens_generated: int
    total_time: float  # seconds, tokenization included
    time_per_token: float  # seconds; that of one token when none was generated
    tokens_per_second: float
