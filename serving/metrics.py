"""Figures: of all requests for Prometheus, of one request for its client."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from self_speculation import GenerationStrategyResult
from self_speculation.results import DraftStats, SourceCounts
from serving.engine import Engine, Job

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)


class FinishedRequest(NamedTuple):
    """An answer and its times in seconds."""

    result: GenerationStrategyResult
    queue_time: float  # from arrival to admission
    num_reasoning: int = 0  # tokens of the thinking

    @classmethod
    def of(cls, job: Job, result: GenerationStrategyResult) -> FinishedRequest:
        return cls(result, job.admission_time - job.arrival_time, job.request.num_thinking_tokens)

    def __str__(self) -> str:
        return (
            f"{self.result.stop_reason}, {self.num_tokens} tokens in {self.latency:.2f} s, the first after "
            f"{self.time_to_first_token:.2f} s; prompt {self.result.num_prompt_tokens} "
            f"({self.result.num_cached_tokens} cached); "
            f"{self.drafts.num_accepted} of {self.drafts.num_drafted} drafted accepted"
        )

    @property
    def num_tokens(self) -> int:
        """Generated tokens, an end id included."""
        return len(self.result.predicted_tokens) + (self.result.end_token_id is not None)

    @property
    def time_to_first_token(self) -> float:
        """From arrival on."""
        return self.queue_time + self.result.prefill_time

    @property
    def latency(self) -> float:
        """From arrival to the end."""
        return self.time_to_first_token + self.result.decode_time

    @property
    def drafts(self) -> DraftStats:
        return self.result.draft_stats or DraftStats()


class Metrics:
    """Counters of one server, in a registry of its own. Those that vLLM has too bear its names alone, which
    dashboards know.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self.registry, self._labels = CollectorRegistry(), (model, "0")
        counter = partial(Counter, namespace="self_speculation", registry=self.registry)
        self._answers = counter("answers", "Answers by stop reason", ["ended_by"])
        self._refused = counter("refused", "Requests without an answer by HTTP status", ["status"])
        self._cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts found in the cache")
        self._drafted = counter("drafted_tokens", "Drafted tokens by draft source", ["source"])
        self._accepted = counter("accepted_tokens", "Accepted draft tokens by draft source", ["source"])

        def vllm(kind: Any, name: str, about: str, *labels: str, **options: Any) -> Any:
            names = ["model_name", "engine", *labels]
            metric = kind(f"vllm:{name}", about, names, registry=self.registry, **options)
            return metric if labels else metric.labels(*self._labels)

        waiting = vllm(Gauge, "num_requests_waiting", "Requests in the queue")
        waiting.set_function(lambda: len(engine.waiting))
        running = vllm(Gauge, "num_requests_running", "Requests in the batch")
        running.set_function(lambda: len(engine.in_flight))
        self._prompt_tokens = vllm(Counter, "prompt_tokens", "Tokens of prompts")
        self._tokens = vllm(Counter, "generation_tokens", "Generated tokens")
        times = partial(vllm, Histogram, buckets=_SECONDS)
        self._queue = times("request_queue_time_seconds", "From arrival to a slot in the batch")
        self._first_token = times("time_to_first_token_seconds", "From arrival to the first token")
        self._decoding = times("request_decode_time_seconds", "From the first token to the last")
        self._latency = times("e2e_request_latency_seconds", "From arrival to the end")
        self._num_drafts = vllm(Counter, "spec_decode_num_drafts", "Drafts")
        self._num_drafted = vllm(Counter, "spec_decode_num_draft_tokens", "Drafted tokens")
        self._num_accepted = vllm(Counter, "spec_decode_num_accepted_tokens", "Accepted draft tokens")
        by_position = "spec_decode_num_accepted_tokens_per_pos"
        self._accepted_per_pos = vllm(Counter, by_position, "Accepted draft tokens by position", "position")

    def count_error(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def count(self, finished: FinishedRequest) -> None:
        """Count an answer, whole or cancelled. Called by the engine's thread."""
        result, drafts = finished.result, finished.drafts
        self._answers.labels(result.stop_reason).inc()
        self._prompt_tokens.inc(result.num_prompt_tokens)
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
            self._decoding.observe(result.decode_time)


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
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {
            "accepted_prediction_tokens": predicted.accepted,
            "rejected_prediction_tokens": predicted.drafted - predicted.accepted,
            "reasoning_tokens": sum(each.num_reasoning for each in finished),
        },
        "prompt_tokens_details": {"cached_tokens": sum(result.num_cached_tokens for result in prompted)},
    }
    speculative_decoding = {
        "drafted": drafts.num_drafted,
        "accepted": drafts.num_accepted,
        "acceptance_rate": drafts.acceptance_rate,
        "mean_accepted_length": drafts.mean_accepted_length,
        "by_source": {name: counts._asdict() for name, counts in drafts.by_source.items()},
        "acceptance_histogram": [a - b for a, b in pairwise([*accepted_at_least, 0])],
    }
    metrics = {
        "tokens_per_second": decoded / seconds if decoded else None,
        "time_to_first_token": min(each.time_to_first_token for each in finished),
        "speculative_decoding": speculative_decoding,
    }
    return {"usage": usage, "metrics": metrics}
