"""Figures: of all requests for Prometheus, of one request for its client."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from self_speculation import GenerationStrategyResult
from self_speculation.results import DraftStats, SourceCounts
from serving.engine import Engine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)


class FinishedRequest(NamedTuple):
    """An answer and its times in seconds."""

    result: GenerationStrategyResult
    queue_time: float  # from arrival to admission
    num_reasoning: int = 0  # tokens of the thinking

    @property
    def num_tokens(self) -> int:
        """Generated tokens, an end id included."""
        return self.result.num_decode_tokens + 1

    @property
    def time_to_first_token(self) -> float:
        """From arrival on."""
        return self.queue_time + self.result.prefill_time

    @property
    def drafts(self) -> DraftStats:
        return self.result.draft_stats or DraftStats()


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.registry, self._model = CollectorRegistry(), model
        counter = partial(Counter, namespace="self_speculation", registry=self.registry)
        gauge = partial(Gauge, namespace="self_speculation", registry=self.registry)
        times = partial(Histogram, namespace="self_speculation", registry=self.registry, buckets=_SECONDS)
        self._answers = counter("answers", "Answers by stop reason", ["ended_by"])
        self._refused = counter("refused", "Requests without an answer by HTTP status", ["status"])
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self._cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts found in the cache")
        self._tokens = counter("generated_tokens", "Generated tokens")
        self._drafted = counter("drafted_tokens", "Drafted tokens by draft source", ["source"])
        self._accepted = counter("accepted_tokens", "Accepted draft tokens by draft source", ["source"])
        self._first_token = times("time_to_first_token_seconds", "From arrival to the first token")
        self._decoding = times("decode_time_seconds", "From the first token to the last")
        gauge("waiting", "Requests in the queue").set_function(lambda: len(engine.waiting))
        gauge("in_flight", "Requests in the batch").set_function(lambda: len(engine.in_flight))
        # The names that dashboards of vLLM know.
        vllm = partial(Counter, namespace="vllm:spec_decode", registry=self.registry)
        labels = ["model_name", "engine"]
        self._num_drafts = vllm("num_drafts", "Drafts", labels)
        self._num_draft_tokens = vllm("num_draft_tokens", "Drafted tokens", labels)
        self._num_accepted = vllm("num_accepted_tokens", "Accepted draft tokens", labels)
        by_position = "Accepted draft tokens by position"
        self._accepted_per_pos = vllm("num_accepted_tokens_per_pos", by_position, [*labels, "position"])

    def count_error(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def count(self, finished: FinishedRequest) -> None:
        result, drafts, labels = finished.result, finished.drafts, (self._model, "0")
        self._answers.labels(result.stop_reason).inc()
        self._prompt_tokens.inc(result.num_prompt_tokens)
        self._cached_tokens.inc(result.num_cached_tokens)
        self._tokens.inc(finished.num_tokens)
        for source, counts in drafts.by_source.items():
            self._drafted.labels(source).inc(counts.drafted)
            self._accepted.labels(source).inc(counts.accepted)
        self._num_drafts.labels(*labels).inc(_num_drafts(drafts))
        self._num_draft_tokens.labels(*labels).inc(drafts.num_drafted)
        self._num_accepted.labels(*labels).inc(drafts.num_accepted)
        for position, accepted in enumerate(drafts.accepted_by_position):
            self._accepted_per_pos.labels(*labels, str(position)).inc(accepted)
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
    accepted_at_least = [num_drafts := _num_drafts(drafts), *drafts.accepted_by_position]
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
        # vLLM's names.
        "mean_acceptance_length": 1 + drafts.num_accepted / num_drafts if num_drafts else None,
        "draft_acceptance_rate": drafts.acceptance_rate,
        "num_draft_tokens": drafts.num_drafted,
        "num_accepted_draft_tokens": drafts.num_accepted,
        "num_spec_steps": num_drafts,
        "acceptance_histogram": [a - b for a, b in pairwise([*accepted_at_least, 0])],
    }
    metrics = {
        "tokens_per_second": decoded / seconds if decoded else None,
        "time_to_first_token": min(each.time_to_first_token for each in finished),
        "speculative_decoding": speculative_decoding,
    }
    return {"usage": usage, "metrics": metrics}
