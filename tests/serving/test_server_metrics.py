"""Figures of answers that a test of the server does not get."""

from unittest.mock import Mock

from self_speculation import GenerationStrategyResult
from self_speculation.results import DraftStats
from serving.metrics import FinishedRequest, Metrics, figures


def test_choices_decode_side_by_side():
    """Guards against the times of a batch's rows that add up."""
    result = GenerationStrategyResult([5] * 11, num_decode_tokens=10, decode_time=2.0)
    choice = FinishedRequest(result, DraftStats(), 11, 0, 0.0, 1.0, 3.0)
    assert figures([choice, choice], 2)["metrics"]["tokens_per_second"] == 20 / 2.0


def test_a_request_that_is_cancelled_before_its_first_token():
    """Guards against times to a token that never came."""
    metrics = Metrics(Mock(waiting=[], in_flight=[], cache_usage=0), "tiny", log_requests=False)
    job = Mock(arrival_time=1.0, admission_time=2.0, request=Mock(reader=Mock(num_thinking=0)))
    metrics.count(job, GenerationStrategyResult([], stop_reason="cancelled"), None)
    labels = {"model_name": "tiny", "engine": "0"}
    times = ("e2e_request_latency", "time_to_first_token", "request_decode_time")
    counts = [metrics.registry.get_sample_value(f"vllm:{name}_seconds_count", labels) for name in times]
    assert counts == [1, 0, 0]
