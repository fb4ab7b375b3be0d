"""Figures: of all requests for Prometheus and the log, of one request for its client."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from runs.status import print_status
from self_speculation import GenerationStrategyResult
from self_speculation.results import DraftStats, SourceCounts
from serving.engine import ClientDisconnected, Engine, Job
from serving.errors import APIError
from serving.protocol import FINISH_REASONS

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)
_TOKENS = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
_LONGEST_LINE = 200  # characters
_MOST_NAMES = 200  # of ignored fields, since clients could fill the log with them


class FinishedRequest(NamedTuple):
    """An answer, and its times in seconds."""

    result: GenerationStrategyResult
    drafts: DraftStats
    num_tokens: int  # generated ones, an end id included
    num_reasoning: int  # those of the thinking
    queue_time: float  # from arrival to admission
    time_to_first_token: float  # from arrival on
    latency: float  # from arrival to the end

    @classmethod
    def of(cls, job: Job, result: GenerationStrategyResult) -> FinishedRequest:
        num_tokens = len(result.predicted_tokens) + (result.end_token_id is not None)
        queue_time = job.admission_time - job.arrival_time
        first = queue_time + result.prefill_time
        counts = (result.draft_stats or DraftStats(), num_tokens, job.request.reader.num_thinking)
        return cls(result, *counts, queue_time, first, first + result.decode_time)

    def __str__(self) -> str:
        return (
            f"{self.result.stop_reason}, {self.num_tokens} tokens in {self.latency:.2f} s, the first after "
            f"{self.time_to_first_token:.2f} s; prompt {self.result.num_prompt_tokens} "
            f"({self.result.num_cached_tokens} cached); "
            f"{self.drafts.num_accepted} of {self.drafts.num_drafted} drafted accepted"
        )


class Metrics:
    """Counters of one server, in a registry of its own. Those that vLLM has too bear its names alone, which
    dashboards know. Lines on standard error name fields that are ignored and, with `log_requests`, say how
    each request ended.
    """

    def __init__(self, engine: Engine, model: str, log_requests: bool) -> None:
        self.registry, self._labels = CollectorRegistry(), (model, "0")
        self._log_requests, self._ignored = log_requests, set[str]()
        counter = partial(Counter, namespace="self_speculation", registry=self.registry)
        self._refused = counter("refused", "Requests without an answer by HTTP status", ["status"])
        self._cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts found in the cache")
        self._drafted = counter("drafted_tokens", "Drafted tokens by draft source", ["source"])
        self._accepted = counter("accepted_tokens", "Accepted draft tokens by draft source", ["source"])

        def vllm(kind: Any, name: str, about: str, *labels: str, **options: Any) -> Any:
            names = ["model_name", "engine", *labels]
            metric = kind(f"vllm:{name}", about, names, registry=self.registry, **options)
            return metric if labels else metric.labels(*self._labels)

        vllm(Gauge, "num_requests_waiting", "Requests in the queue").set_function(lambda: len(engine.waiting))
        vllm(Gauge, "num_requests_running", "Requests in the batch").set_function(
            lambda: len(engine.in_flight)
        )
        vllm(Gauge, "kv_cache_usage_perc", "Keys and values in use, 1: all").set_function(
            lambda: engine.cache_usage
        )
        self._finished = vllm(Counter, "request_success", "Answers by their end", "finished_reason")
        self._prompt_tokens = vllm(Counter, "prompt_tokens", "Tokens of prompts")
        self._tokens = vllm(Counter, "generation_tokens", "Generated tokens")
        sizes = partial(vllm, Histogram, buckets=_TOKENS)
        self._prompt_size = sizes("request_prompt_tokens", "Tokens of a prompt")
        self._size = sizes("request_generation_tokens", "Generated tokens of a request")
        times = partial(vllm, Histogram, buckets=_SECONDS)
        self._between = times("inter_token_latency_seconds", "Between two rounds of a request")
        self._per_token = times("request_time_per_output_token_seconds", "Decode time by tokens of a request")
        self._queue = times("request_queue_time_seconds", "From arrival to a slot in the batch")
        self._first_token = times("time_to_first_token_seconds", "From arrival to the first token")
        self._prefill = times("request_prefill_time_seconds", "From a slot in the batch to the first token")
        self._decoding = times("request_decode_time_seconds", "From the first token to the last")
        self._latency = times("e2e_request_latency_seconds", "From arrival to the end")
        self._num_drafts = vllm(Counter, "spec_decode_num_drafts", "Drafts")
        self._num_drafted = vllm(Counter, "spec_decode_num_draft_tokens", "Drafted tokens")
        self._num_accepted = vllm(Counter, "spec_decode_num_accepted_tokens", "Accepted draft tokens")
        by_position = "spec_decode_num_accepted_tokens_per_pos"
        self._accepted_per_pos = vllm(Counter, by_position, "Accepted draft tokens by position", "position")

    def count_error(self, error: Exception, origin: str) -> APIError:
        """Count any error of a request; returns the one that the client gets."""
        found = APIError.of(error)
        self._refused.labels(str(found.status)).inc()
        self._log(origin, f"{found.status}, {found}")
        return found

    def count_round(self, num_rows: int, seconds: float) -> None:
        for _ in range(num_rows):
            self._between.observe(seconds)

    def count(self, job: Job, result: GenerationStrategyResult | None, error: Exception | None) -> None:
        """Count a job that ends, in the engine's thread. Nobody else counts that its client is gone, and all
        other errors reach `count_error`.
        """
        if result is None:
            if isinstance(error, ClientDisconnected):
                self.count_error(error, job.origin)
            return
        finished = FinishedRequest.of(job, result)
        drafts = finished.drafts
        if error is None or isinstance(error, ClientDisconnected):
            self._log(job.origin, finished)
            self._finished.labels(*self._labels, FINISH_REASONS[result.stop_reason or "cancelled"]).inc()
        self._prompt_tokens.inc(result.num_prompt_tokens)
        self._prompt_size.observe(result.num_prompt_tokens)
        self._size.observe(finished.num_tokens)
        self._cached_tokens.inc(result.num_cached_tokens)
        self._tokens.inc(finished.num_tokens)
        for source, counts in drafts.by_source.items():
            self._drafted.labels(source).inc(counts.drafted)
            self._accepted.labels(source).inc(counts.accepted)
        self._num_drafts.inc(_num_drafts(drafts))
        self._num_drafted.inc(drafts.num_drafted)
        self._num_accepted.inc(drafts.num_accepted)
        for position, accepted in enumerate(drafts.accepted_by_position):
            self._accepted_per_pos.labels(*self._labels, str(position)).inc(accepted)
        self._queue.observe(finished.queue_time)
        self._latency.observe(finished.latency)
        if finished.num_tokens:  # a request can be cancelled before its first token
            self._first_token.observe(finished.time_to_first_token)
            self._prefill.observe(result.prefill_time)
            self._decoding.observe(result.decode_time)
        if finished.num_tokens > 1:
            self._per_token.observe(result.decode_time / (finished.num_tokens - 1))

    def _log(self, origin: str, line: object) -> None:
        if self._log_requests:  # in ASCII, since clients could write anything
            self._print(ascii(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {origin}: {line}")[1:-1])

    def _print(self, line: str) -> None:
        is_short = len(line) <= _LONGEST_LINE
        print_status(line if is_short else f"{line[: _LONGEST_LINE - 3]}...")

    def name_ignored(self, names: set[str]) -> None:
        """Print the name of each field once."""
        room = _MOST_NAMES - len(self._ignored)
        if new := sorted({ascii(name[:50]) for name in names} - self._ignored)[:room]:
            self._ignored.update(new)
            self._print(f"requests have fields that this server ignores: {', '.join(new)}")


def _num_drafts(drafts: DraftStats) -> int:
    return sum(drafts.drafted_by_position[:1])


def figures(finished: Sequence[FinishedRequest], n: int) -> dict[str, Any]:
    """`usage` and `metrics` over the choices of a request, n per prompt; see docs/serving.md."""
    results, prompted = [each.result for each in finished], [each.result for each in finished[::n]]
    prompt = sum(result.num_prompt_tokens for result in prompted)
    completion = sum(each.num_tokens for each in finished)
    seconds = max(result.decode_time for result in results)
    decoded = sum(result.num_decode_tokens for result in results)
    drafts = sum((each.drafts for each in finished), DraftStats())
    predicted = drafts.by_source.get("prediction", SourceCounts(0, 0, 0))
    # [j]: drafts of which at least j tokens were accepted.
    accepted_at_least = [_num_drafts(drafts), *drafts.accepted_by_position]
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
                "acceptance_histogram": [a - b for a, b in pairwise([*accepted_at_least, 0])],
            },
        },
    }
