"""Figures: all requests' for Prometheus and the log, one request's for the client."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from arguments import JSONObject
from runs.status import print_status
from self_speculation import GenerationStrategyResult
from self_speculation.requests.results import DraftStats, SourceCounts
from serving.engine import Engine, Job
from serving.errors import APIError
from serving.protocol import FINISH_REASONS

_TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)  # seconds
_SIZES = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]  # tokens
_LONGEST_LINE = 200  # characters
_MOST_NAMES = 200  # ignored fields in the log, which clients could fill
_LONGEST_NAME = 50  # characters that are kept

Metric = TypeVar("Metric", bound=MetricWrapperBase)


class Origin(NamedTuple):
    """Where a request came from, for the log."""

    method: str
    path: str
    request_id: str

    def __str__(self) -> str:
        return " ".join(self)


class FinishedRequest:
    """The result of a job, and times in seconds."""

    def __init__(self, job: Job, result: GenerationStrategyResult) -> None:
        self.result = result
        self.drafts = result.draft_stats or DraftStats()
        self.num_tokens = len(result.predicted_tokens) + (result.end_token_id is not None)
        self.num_reasoning = job.request.reader.num_thinking
        self.queue_time = job.admission_time - job.arrival_time
        self.time_to_first_token = self.queue_time + result.prefill_time
        self.time_per_token = result.decode_time / max(1, self.num_tokens - 1)
        self.latency = self.time_to_first_token + result.decode_time

    def __str__(self) -> str:
        return (
            f"{self.result.stop_reason}, {self.num_tokens} tokens in {self.latency:.2f} s, the first after "
            f"{self.time_to_first_token:.2f} s; prompt {self.result.num_prompt_tokens} "
            f"({self.result.num_cached_tokens} cached); "
            f"{self.drafts.num_accepted} of {self.drafts.num_drafted} drafted accepted"
        )


# vLLM's name of a counter, the meaning, and the number that a finished request adds.
_COUNTED: tuple[tuple[str, str, Callable[[FinishedRequest], float]], ...] = (
    ("prompt_tokens", "Tokens of prompts", lambda each: each.result.num_prompt_tokens),
    ("prefix_cache_queries", "Tokens of prompts", lambda each: each.result.num_prompt_tokens),
    ("prefix_cache_hits", "Tokens of prompts in the cache", lambda each: each.result.num_cached_tokens),
    ("generation_tokens", "Generated tokens", lambda each: each.num_tokens),
    ("spec_decode_num_drafts", "Drafts", lambda each: each.drafts.num_drafts),
    ("spec_decode_num_draft_tokens", "Drafted tokens", lambda each: each.drafts.num_drafted),
    ("spec_decode_num_accepted_tokens", "Accepted draft tokens", lambda each: each.drafts.num_accepted),
)
# vLLM's name of a histogram, the meaning, and the value of a finished request that has a token.
_OBSERVED: tuple[tuple[str, str, Callable[[FinishedRequest], float]], ...] = (
    ("request_prompt_tokens", "Tokens of a prompt", lambda each: each.result.num_prompt_tokens),
    ("request_generation_tokens", "Tokens of an answer", lambda each: each.num_tokens),
    ("request_queue_time_seconds", "From arrival to a slot in the batch", lambda each: each.queue_time),
    ("request_prefill_time_seconds", "From the slot to a token", lambda each: each.result.prefill_time),
    ("request_decode_time_seconds", "From the first token to the end", lambda each: each.result.decode_time),
    ("time_to_first_token_seconds", "From arrival to a token", lambda each: each.time_to_first_token),
    ("request_time_per_output_token_seconds", "Between two tokens", lambda each: each.time_per_token),
    ("e2e_request_latency_seconds", "From arrival to the end", lambda each: each.latency),
)


class Metrics:
    """Counters of one server, in one registry. The names are vLLM's, which dashboards know. Lines on standard
    error name ignored fields and, with `log_requests`, say how each request ended.
    """

    def __init__(self, engine: Engine, model: str, log_requests: bool) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self._log_requests = log_requests
        self._ignored = set[str]()
        about = "Requests without an answer by HTTP status"
        self._refused = Counter("self_speculation_refused", about, ["status"], registry=self.registry)
        for name, about, value in (
            ("num_requests_waiting", "Requests in the queue", lambda: len(engine.waiting)),
            ("num_requests_running", "Requests in the batch", lambda: len(engine.in_flight)),
            ("kv_cache_usage_perc", "Keys and values in use, 1: all", lambda: engine.cache_usage),
        ):
            self._vllm(Gauge, name, about).labels(**self._labels).set_function(value)
        self._finished = self._vllm(Counter, "request_success", "Answers by their end", "finished_reason")
        about = "Accepted draft tokens by position"
        self._per_position = self._vllm(Counter, "spec_decode_num_accepted_tokens_per_pos", about, "position")
        self._inter_token_latency = self._observed(
            "inter_token_latency_seconds", "Between two rounds of a request"
        )
        self._counters = [
            (self._vllm(Counter, name, about).labels(**self._labels), value)
            for name, about, value in _COUNTED
        ]
        self._histograms = [(self._observed(name, about), value) for name, about, value in _OBSERVED]

    def _vllm(self, kind: type[Metric], name: str, about: str, *labels: str) -> Metric:
        return kind(f"vllm:{name}", about, [*self._labels, *labels], registry=self.registry)

    def _observed(self, name: str, about: str) -> Histogram:
        buckets = _TIMES if name.endswith("seconds") else _SIZES
        found = Histogram(f"vllm:{name}", about, self._labels, registry=self.registry, buckets=buckets)
        return found.labels(**self._labels)

    def count_error(self, error: BaseException, origin: Origin) -> APIError:
        """Count an error of a request. Returns the error that the client gets."""
        found = APIError.of(error)
        self._refused.labels(str(found.status)).inc()
        self._log(origin, f"{found.status}, {found}", status=found.status)
        return found

    def count_round(self, num_rows: int, seconds: float) -> None:
        for _ in range(num_rows):
            self._inter_token_latency.observe(seconds)

    def count(self, job: Job, result: GenerationStrategyResult, error: Exception | None) -> None:
        """Count a job that was in the batch, in the engine's thread. `count_error` counts the error."""
        finished = FinishedRequest(job, result)
        if error is None:
            reason = FINISH_REASONS[str(result.stop_reason)]
            self._log(
                job.origin,
                finished,
                finish_reason=reason,
                prompt_tokens=result.num_prompt_tokens,
                cached_tokens=result.num_cached_tokens,
                completion_tokens=finished.num_tokens,
                drafted_tokens=finished.drafts.num_drafted,
                accepted_tokens=finished.drafts.num_accepted,
                queue_time=round(finished.queue_time, 6),
                time_to_first_token=round(finished.time_to_first_token, 6),
                latency=round(finished.latency, 6),
            )
            self._finished.labels(**self._labels, finished_reason=reason).inc()
        for counter, value in self._counters:
            counter.inc(value(finished))
        for position, accepted in enumerate(finished.drafts.accepted_by_position):
            self._per_position.labels(**self._labels, position=str(position)).inc(accepted)
        for histogram, value in self._histograms if finished.num_tokens else ():
            histogram.observe(value(finished))

    def name_ignored(self, names: set[str]) -> None:
        """Print each new name of an ignored field."""
        new = sorted({name[:_LONGEST_NAME] for name in names} - self._ignored)
        if new and len(self._ignored) < _MOST_NAMES:
            self._ignored.update(new)
            _print(f"requests have fields that this server ignores: {', '.join(new)}")

    def _log(self, origin: object, line: object, **fields: object) -> None:
        if self._log_requests:
            request = origin._asdict() if isinstance(origin, Origin) else {}
            request = {name: _shortened(value) for name, value in request.items()}
            _print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {origin}: {line}", **request, **fields)


def _print(line: str, **fields: object) -> None:
    """Print in ASCII, since clients could write anything."""
    print_status(_shortened(ascii(line)[1:-1]), **fields)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE - 3]}..."


def figures(finished: Sequence[FinishedRequest], n: int) -> JSONObject:
    """Return `usage` and `metrics` of a request's choices, n per prompt; see docs/serving.md."""
    results = [each.result for each in finished]
    prompted = [each.result for each in finished[::n]]
    prompt = sum(result.num_prompt_tokens for result in prompted)
    completion = sum(each.num_tokens for each in finished)
    seconds = max(result.decode_time for result in results)
    decoded = sum(result.num_decode_tokens for result in results)
    drafts = sum((each.drafts for each in finished), DraftStats())
    predicted = drafts.by_source.get("prediction", SourceCounts(0, 0, 0))
    return {
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {
                "accepted_prediction_tokens": predicted.accepted,
                "rejected_prediction_tokens": predicted.drafted - predicted.accepted,
                "reasoning_tokens": sum(each.num_reasoning for each in finished),
            },
            "prompt_tokens_details": {"cached_tokens": sum(each.num_cached_tokens for each in prompted)},
        },
        "metrics": {
            "tokens_per_second": decoded / seconds if decoded else None,
            "time_to_first_token": min(each.time_to_first_token for each in finished),
            "speculative_decoding": {
                "drafted": drafts.num_drafted,
                "accepted": drafts.num_accepted,
                "acceptance_rate": drafts.acceptance_rate,
                "mean_accepted_length": drafts.mean_accepted_length,
                "by_source": {name: counts._asdict() for name, counts in drafts.by_source.items()},
            },
        },
    }
