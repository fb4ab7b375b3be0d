"""The thread that runs the model: what it accepts and aborts, and that jobs do not disturb each other."""

import copy
import math
import queue
import time
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import card_llama, generate
from helpers import watch
from servers import GREEDY, Running, held, tiny_generator, until

from self_speculation import GenerationStrategyResult, Request
from self_speculation.backends.runners import capture_decoding
from self_speculation.engine.prefix_cache import kept_caches
from self_speculation.engine.scheduler import Scheduler
from self_speculation.weights.kernels import cpu_operators
from serving.engine import ClientDisconnected, Job, QueueFull, RequestTimeout, ServerShutdown

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]


@pytest.fixture
def engine(text_model, byte_tokenizer):
    engine = Running(tiny_generator(text_model, byte_tokenizer), GREEDY, 4, max_waiting=4)
    yield engine
    engine.stop()


def submit(engine, prompts):
    """Submit a job per prompt; returns the jobs and a queue for each result."""
    results = [queue.Queue() for _ in prompts]
    jobs = [Job(Request(prompt), to.put, timeout=600) for prompt, to in zip(prompts, results, strict=True)]
    engine.submit(jobs)
    return jobs, results


def kinds(results):
    return [type(result.get(timeout=60)) for result in results]


@pytest.mark.parametrize("longest", [[5, 6, 7], [5, 6] * 150])
def test_no_request_waits_for_a_capture(longest, byte_tokenizer, graphs, monkeypatch):
    """Guards against streams that stand still while a pass for one more row is captured, or while all are
    captured again for a long request.
    """
    monkeypatch.setattr("serving.engine._USUAL_PROMPT", 100)
    model = card_llama(4, max_position_embeddings=1024)
    capture_decoding(model)
    engine = Running(tiny_generator(model, byte_tokenizer), GREEDY, 4, max_waiting=4)
    num_captured = len(graphs.captured)
    assert kinds(submit(engine, [longest, *PROMPTS[1:]])[1]) == [GenerationStrategyResult] * 4
    engine.stop()
    assert len(graphs.captured) == num_captured > 0


def failing(*_, **__):
    raise ArithmeticError("a criterion fails")


def test_the_queue_is_bounded_and_takes_all_or_none(engine, monkeypatch):
    """Four slots, four waiting jobs. Guards against half a request, jobs that count as running without a
    slot, and a queue time that is not counted.
    """
    numbers = []
    watch(monkeypatch, engine._scheduler, "add_request", lambda *_: numbers.append(len(engine.in_flight)))
    with held(engine) as at_rest:
        _, results = submit(engine, PROMPTS)
        assert at_rest.wait(60)
        results += submit(engine, PROMPTS[:3])[1]
        with pytest.raises(QueueFull, match="3 requests wait already"):
            submit(engine, PROMPTS[:2])
        [last], more = submit(engine, PROMPTS[:1])
        submitted = time.perf_counter()
    assert kinds(results + more) == [GenerationStrategyResult] * 8
    assert last.arrival_time <= submitted <= last.admission_time
    assert max(numbers) == 4


def test_a_cancelled_or_late_job_ends_at_the_next_step(engine):
    """In flight and waiting. Guards against sequences that decode although their client is gone."""
    with held(engine) as at_rest:
        jobs, results = submit(engine, [*PROMPTS, *PROMPTS[:2]])
        assert at_rest.wait(60)
        jobs[0].is_cancelled.set()
        jobs[4].is_cancelled.set()
        jobs[1].timeout = jobs[5].timeout = 0
    aborted = [ClientDisconnected, RequestTimeout]
    assert kinds(results) == [*aborted, *[GenerationStrategyResult] * 2, *aborted]
    assert [math.isnan(job.admission_time) for job in jobs] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(("seconds", "kind"), [(0, ServerShutdown), (600, GenerationStrategyResult)])
def test_a_shutdown_finishes_what_it_can_and_aborts_the_rest(engine, seconds, kind):
    """Guards against jobs that enter during shutdown, and a shutdown that does not wait for those before."""
    with held(engine) as at_rest:
        _, results = submit(engine, PROMPTS * 2)
        assert at_rest.wait(60)
        engine.shut_down(seconds)
        engine.shut_down(600)  # a later one gives no more time
        with pytest.raises(ServerShutdown):
            submit(engine, [[5]])
    assert kinds(results) == [kind] * 8
    assert engine.stop()


def test_a_prompt_that_is_alone_holds_nobody_up(engine, monkeypatch):
    """Guards against a request, or the end of the server, that waits for a thousand tokens."""
    sizes = []
    watch(
        monkeypatch,
        engine._scheduler,
        "_prefill",
        lambda chosen: sizes.append(sum(width for _, width in chosen)),
    )
    with held(engine) as at_rest:
        _, results = submit(engine, [[5] * 200])
        assert at_rest.wait(60)
    assert kinds(results) == [GenerationStrategyResult]
    assert (max(sizes), len(sizes)) == ((128, 2) if cpu_operators().has_tiles else (64, 4))


def test_errors_of_callbacks_end_nothing(engine):
    """Guards against an engine that ends because somebody cannot count or keep a result."""
    engine.on_end = engine.on_round = failing
    engine.submit([Job(Request(PROMPTS[0]), failing)])
    assert kinds(submit(engine, PROMPTS)[1]) == [GenerationStrategyResult] * 4
    assert engine.stop()


def test_an_idle_engine_gives_back_memory_of_long_prompts(text_model, byte_tokenizer, monkeypatch):
    """Guards against keys and values of one long prompt that stay for ever; those of usual ones stay."""
    monkeypatch.setattr("serving.engine._IDLE_SECONDS", 0.01)
    monkeypatch.setattr("serving.engine._USUAL_PROMPT", 88)
    model = copy.deepcopy(text_model)
    shrunk = watch(monkeypatch, Scheduler, "shrink_cache")
    engine = Running(tiny_generator(model, byte_tokenizer), GREEDY, 4, max_waiting=4)
    until(lambda: shrunk)  # once each time that the engine is idle
    for prompt, num_kept in (([5] * 80, 1), ([5] * 200, 0), ([5] * 9, 1)):
        shrunk.clear()
        [result] = submit(engine, [prompt])[1]
        alone = generate(model, prompt, eos=[], max_steps=GREEDY.max_steps)
        assert result.get(timeout=60).predicted_tokens == alone.predicted_tokens
        until(lambda: shrunk)
        assert len(kept_caches(model)) == num_kept
    assert engine.stop()


@pytest.mark.parametrize("name", ["pop_finished", "step", "add_request"])
def test_an_engine_that_fails_or_loses_its_gpu_ends_all_jobs(name, engine, monkeypatch):
    """Guards against clients that wait for ever, and a server that is healthy although every request
    fails, so that nothing restarts it.
    """
    honest = getattr(engine._scheduler, name)
    operation = "unbind" if name == "step" else "__setitem__"

    def lost(*args):
        if name == "pop_finished":
            raise ArithmeticError
        with patch.object(torch.Tensor, operation, fails):
            return honest(*args)

    fails = Mock(side_effect=torch.AcceleratorError("CUDA error: device-side assert triggered"))
    monkeypatch.setattr(engine._scheduler, name, lost)
    assert kinds(submit(engine, PROMPTS * 2)[1]) == [ServerShutdown] * 8
    assert not engine.accepts_jobs
    assert not engine.stop()
