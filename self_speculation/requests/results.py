"""The results of a generation, and the counts of drafts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

StopReason = Literal["eos", "stop_word", "stopping_criteria", "max_steps", "context", "cancelled"]


class DraftRound(NamedTuple):
    """A draft and the verification of it; the output may end inside the accepted tokens."""

    source: str
    drafted: int
    accepted: int
    emitted: int

    @property
    def in_output(self) -> int:
        """Accepted tokens in the output."""
        return min(self.accepted, self.emitted)


class SourceCounts(NamedTuple):
    """Counts of one draft source."""

    rounds: int
    drafted: int  # tokens
    accepted: int  # accepted tokens in the output


@dataclass(frozen=True)
class DraftStats:
    """Counts of draft rounds, of one generation or several; `+` adds them."""

    rounds: Counter[DraftRound] = field(default_factory=Counter)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> DraftStats:
        """The inverse of `to_rows`; rows of several answers add up."""
        stats = cls()
        for row in rows:
            stats.rounds[DraftRound(*(row[name] for name in DraftRound._fields))] += row["rounds"]
        return stats

    def to_rows(self) -> list[dict[str, str | int]]:
        """For JSON: each kind of round, and how many `rounds` there were of it."""
        return [{**kind._asdict(), "rounds": n} for kind, n in self.rounds.items()]

    def __add__(self, other: DraftStats) -> DraftStats:
        return DraftStats(self.rounds + other.rounds)

    def add(self, source: str | None, drafted: int, accepted: int, emitted: int) -> None:
        """Count one round; the source is "none" if nothing was drafted."""
        self.rounds[DraftRound(source if source and drafted else "none", drafted, accepted, emitted)] += 1

    @property
    def num_verifications(self) -> int:
        """Rounds with and without drafts."""
        return self.rounds.total()

    @property
    def num_drafts(self) -> int:
        """Rounds with drafts."""
        return sum(n for kind, n in self.rounds.items() if kind.drafted)

    @property
    def num_drafted(self) -> int:
        return sum(n * kind.drafted for kind, n in self.rounds.items())

    @property
    def num_accepted(self) -> int:
        return sum(n * kind.in_output for kind, n in self.rounds.items())

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens; None without drafts."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens per verification."""
        emitted = sum(n * kind.emitted for kind, n in self.rounds.items())
        return emitted / self.num_verifications if self.rounds else None

    @property
    def accepted_by_position(self) -> list[int]:
        """[i]: rounds with an accepted i-th token in the output, up to the longest draft."""
        longest = max((kind.drafted for kind in self.rounds), default=0)
        return [sum(n for kind, n in self.rounds.items() if kind.in_output > i) for i in range(longest)]

    @property
    def by_source(self) -> dict[str, SourceCounts]:
        """Sorted by name."""
        totals: dict[str, SourceCounts] = {}
        for kind, n in sorted(self.rounds.items()):
            known = totals.get(kind.source, (0, 0, 0))
            more = n, n * kind.drafted, n * kind.in_output
            totals[kind.source] = SourceCounts(*map(sum, zip(known, more, strict=True)))
        return totals


@dataclass(frozen=True)
class GenerationStrategyResult:
    """Output, counts and times of a strategy."""

    predicted_tokens: list[int]  # without the end id
    acceptance_rate: float | None = None  # accepted / drafted tokens; None without drafts
    stop_reason: StopReason | None = None
    end_token_id: int | None = None  # the id that ended the output, if one did
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens that the cache already had
    num_decode_tokens: int = 0  # tokens after the first one, with the end id
    prefill_time: float = 0.0  # seconds until the first token
    decode_time: float = 0.0  # seconds for all later tokens
    draft_stats: DraftStats | None = None  # None when autoregressive

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of all tokens but the first one; 0 if there are none."""
        return self.num_decode_tokens / self.decode_time if self.num_decode_tokens else 0.0


@dataclass(frozen=True)
class GenerationResult:
    """Text, ids and times of one completion."""

    generation_strategy_result: GenerationStrategyResult
    decoded_prediction: str  # ends before a stop word
    num_tokens_generated: int
    total_time: float  # seconds, with tokenization
    time_per_token: float  # seconds; total_time if no token was generated
    tokens_per_second: float
    thinking: str = ""  # the text of the thinking, which `decoded_prediction` leaves out
    num_thinking_tokens: int = 0  # of `num_tokens_generated`
