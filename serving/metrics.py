"""What is counted: for Prometheus over all answers, and for a client over those of its request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from self_speculation import GenerationStrategyResult
from self_speculation.results import DraftStats
from serving.engine import Engine, Job

_PREFIX = "self_speculation"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)


@dataclass(frozen=True)
class FinishedRequest:
    """An answer and what it took."""

    job: Job
    result: GenerationStrategyResult
    text: str

    @property
    def num_tokens(self) -> int:
        """Generated ones, an end id included."""
        return self.result.num_decode_tokens + 1

    @property
    def time_to_first_token(self) -> float:
        return self.job.admitted - self.job.arrived + self.result.prefill_time


class Metrics:
    """Those of a server since it began, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", help, labels, registry=self._registry)

        def histogram(name: str, help: str) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}_seconds", help, buckets=_SECONDS, registry=self._registry)

        self._answers = counter("answers", "Answers, by what ended them", "ended_by")
        self._refused = counter("refused", "Requests that got no answer, by HTTP status", "status")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self._cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts that were in the cache")
        self._tokens = counter("generated_tokens", "Tokens generated")
        self._drafted = counter("drafted_tokens", "Tokens drafted, by what drafted them", "source")
        self._accepted = counter("accepted_tokens", "Drafted tokens that were output", "source")
        self._first_token = histogram("time_to_first_token", "From a request's arrival to its first token")
        self._decoding = histogram("decode_time", "From the first token to the last")
        for name, help, number in (
            ("waiting", "Requests that wait for a place", lambda: engine.num_waiting),
            ("in_flight", "Requests that are decoded", lambda: engine.num_in_flight),
        ):
            Gauge(f"{_PREFIX}_{name}", help, registry=self._registry).set_function(number)

    def count_refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def count(self, answered: FinishedRequest) -> None:
        result = answered.result
        self._answers.labels(result.stop_reason).inc()
        self._prompt_tokens.inc(result.num_prompt_tokens)
        self._cached_tokens.inc(result.num_cached_tokens)
        self._tokens.inc(answered.num_tokens)
        for source, counts in (result.drafts_by_source or {}).items():
            self._drafted.labels(source).inc(counts.drafted)
            self._accepted.labels(source).inc(counts.accepted)
        self._first_token.observe(answered.time_to_first_token)
        self._decoding.observe(result.decode_time)

    def exposition(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)


def usage(answered: Sequence[FinishedRequest], n: int) -> dict[str, Any]:
    """Of a request with n answers to each prompt, in the order of their indices; a prompt counts once."""
    first = [each.result for each in answered[::n]]
    prompt, completion = sum(r.num_prompt_tokens for r in first), sum(each.num_tokens for each in answered)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(r.num_cached_tokens for r in first)},
    }


def metrics(answered: Sequence[FinishedRequest]) -> dict[str, Any]:
    """Of all answers to a request: how fast they came, and what became of drafts; see docs/serving.md."""
    results = [each.result for each in answered]
    seconds = max(result.decode_time for result in results)
    decoded = sum(result.num_decode_tokens for result in results)
    drafts = sum((result.draft_stats or DraftStats() for result in results), DraftStats())
    return {
        "tokens_per_second": decoded / seconds if decoded else None,
        "time_to_first_token": min(each.time_to_first_token for each in answered),
        "speculative_decoding": {
            "drafted": drafts.num_drafted,
            "accepted": drafts.num_accepted,
            "acceptance_rate": drafts.acceptance_rate,
            "mean_accepted_length": drafts.mean_accepted_length,
            "by_source": {name: counts._asdict() for name, counts in drafts.by_source.items()},
        },
    }
