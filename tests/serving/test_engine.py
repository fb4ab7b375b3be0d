"""The thread that has the model: what it takes, what it ends, and that jobs do not disturb each other."""

import copy
import pickle
import queue
import threading
import time
from dataclasses import replace

import pytest
import torch
from conftest import generate
from servers import GREEDY, Running, held, tiny_generator

from self_speculation import GenerationStrategyResult, Request, make_strategy
from self_speculation.model.captured_runner import capture_decoding
from serving.engine import ClientDisconnected, Job, QueueFull, RequestTimeout, ServerShutdown, follow

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]


@pytest.fixture
def engine(text_model):
    engine = Running(make_strategy(GREEDY.generation_strategy), text_model, GREEDY, 4, max_waiting=4)
    yield engine
    engine.stop()


def job(prompt, results, most_seconds=600, **request):
    return Job(Request(prompt, **request), lambda result: results.put(result), most_seconds)


def submitted(engine, **request):
    results = queue.Queue()
    engine.submit([job([5, 6, 7], results, **request)])
    return results


def test_no_request_waits_for_a_capture(text_model, graphs):
    """Guards against streams that stand still while a pass for one more row is captured."""
    model = copy.deepcopy(text_model)
    capture_decoding(model)
    engine = Running(make_strategy(GREEDY.generation_strategy), model, GREEDY, 4, max_waiting=4)
    num_captured = len(graphs.captured)
    results = [queue.Queue() for _ in PROMPTS]
    engine.submit([job(prompt, to) for prompt, to in zip(PROMPTS, results, strict=True)])
    for to in results:
        assert to.get(timeout=60).predicted_tokens
    engine.stop()
    assert len(graphs.captured) == num_captured > 0


def test_jobs_get_what_their_prompts_alone_give(engine, text_model):
    """Guards against results that reach another job, more jobs than there are places among them."""
    results = [queue.Queue() for _ in range(2 * len(PROMPTS))]
    engine.submit([job(prompt, to) for prompt, to in zip(PROMPTS * 2, results, strict=True)])
    for prompt, to in zip(PROMPTS * 2, results, strict=True):
        alone = generate(text_model, prompt, eos=[], max_steps=GREEDY.max_steps)
        assert to.get(timeout=60).predicted_tokens == alone.predicted_tokens


def no_numbers(ids, scores):
    return torch.full_like(scores, torch.nan) if ids.shape[1] > 6 else scores


class Broken:
    """A streamer that fails after some tokens."""

    def __init__(self):
        self.left = 3

    def put(self, _):
        self.left -= 1
        if not self.left:
            raise ConnectionError("nobody there")

    def end(self):
        pass


def failing(*_, **__):
    raise ArithmeticError("a criterion of no use")


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"logits_processors": no_numbers}, FloatingPointError),
        ({"stopping_criteria": failing}, ArithmeticError),
        ({"streamer": Broken()}, ConnectionError),
    ],
    ids=["NaN", "criterion", "streamer"],
)
def test_a_job_that_fails_fails_alone(engine, text_model, request_, error):
    """Guards against an error that ends its neighbours, or the thread."""
    results = [queue.Queue() for _ in range(4)]
    for place, to in enumerate(results):
        engine.submit([job(PROMPTS[place], to, **(request_ if place == 1 else {}))])
    assert isinstance(results[1].get(timeout=60), error)
    for place in (0, 2, 3):
        alone = generate(text_model, PROMPTS[place], eos=[], max_steps=GREEDY.max_steps)
        assert results[place].get(timeout=60).predicted_tokens == alone.predicted_tokens
    assert submitted(engine).get(timeout=60).predicted_tokens


def test_a_prompt_beyond_the_context_is_its_own_error(engine):
    results = queue.Queue()
    engine.submit([job([5] * 300, results), job([5, 6], results)])
    kinds = {type(results.get(timeout=60)).__name__ for _ in range(2)}
    assert kinds == {"ValueError", "GenerationStrategyResult"}


def test_a_round_that_fails_ends_its_rows_and_nothing_else(engine, monkeypatch):
    """Out of memory in a pass over several rows: guards against a thread that ends with them."""
    strategy = engine._scheduler._strategy

    def out_of_memory(_):
        monkeypatch.undo()
        raise torch.OutOfMemoryError("out of memory")

    results = queue.Queue()
    with held(engine) as at_rest:
        engine.submit([job(prompt, results) for prompt in PROMPTS])
        assert at_rest.wait(60)
        monkeypatch.setattr(strategy, "step", out_of_memory)
    assert {type(results.get(timeout=60)) for _ in PROMPTS} == {torch.OutOfMemoryError}
    assert submitted(engine).get(timeout=60).predicted_tokens


def test_the_queue_is_bounded_and_takes_all_or_none(engine):
    """Four places and four to wait. Guards against half of a request that is taken, and lost."""
    results = queue.Queue()
    with held(engine) as at_rest:
        engine.submit([job(prompt, results) for prompt in PROMPTS])
        assert at_rest.wait(60)
        engine.submit([job(prompt, results) for prompt in PROMPTS[:3]])
        with pytest.raises(QueueFull, match="3 requests wait already"):
            engine.submit([job(prompt, results) for prompt in PROMPTS[:2]])
        engine.submit([job(PROMPTS[0], results)])
        assert (engine.num_in_flight, engine.num_waiting) == (4, 4)
    assert [results.get(timeout=60).num_prompt_tokens for _ in range(8)]
    assert results.empty()


def test_who_is_gone_or_late_leaves_at_the_next_round(engine):
    """In flight and waiting. Guards against rows that are decoded to their end for nobody."""
    jobs, results = [], []
    for place in range(6):
        results.append(queue.Queue())
        jobs.append(job(PROMPTS[place % 4], results[-1], most_seconds=0 if place in (1, 5) else 600))
    with held(engine) as at_rest:
        engine.submit(jobs)
        assert at_rest.wait(60)
        jobs[0].is_gone = jobs[4].is_gone = True
    kinds = [type(to.get(timeout=60)).__name__ for to in results]
    assert [kinds[i] for i in (0, 4)] == [ClientDisconnected.__name__] * 2
    assert [kinds[i] for i in (1, 5)] == [RequestTimeout.__name__] * 2
    assert [kinds[i] for i in (2, 3)] == ["GenerationStrategyResult"] * 2


def test_what_does_not_end_until_the_shutdown_does_is_ended(engine):
    """Guards against an engine that takes jobs while it ends, and against jobs that are told nothing."""
    results = queue.Queue()
    with held(engine) as at_rest:
        engine.submit([job(prompt, results) for prompt in PROMPTS * 2])
        assert at_rest.wait(60)
        engine.shut_down(0)
        with pytest.raises(ServerShutdown):
            engine.submit([job([5], results)])
    assert engine.stop()
    assert {type(results.get(timeout=60)) for _ in range(8)} == {ServerShutdown}


def test_a_shutdown_lets_end_what_ends_in_time(engine):
    results = queue.Queue()
    engine.submit([job(prompt, results) for prompt in PROMPTS * 2])
    engine.shut_down(600)
    assert {type(results.get(timeout=60)).__name__ for _ in range(8)} == {"GenerationStrategyResult"}


class Ranks:
    """Two processes that hold one model together, as threads: what the first one says, the other hears."""

    def __init__(self):
        self._said, self.times_said = queue.Queue(), 0

    def broadcast_from_rank0(self, _, value):
        if threading.current_thread().name == "follower":
            return pickle.loads(self._said.get(timeout=60))
        self._said.put(pickle.dumps(value))
        self.times_said += 1
        return value


def noting_rounds(strategy):
    """The ids of each row before each round of a strategy, as they come to be."""
    rounds, a_round = [], strategy.step

    def noted(decoding):
        rounds.append([list(sequence.ids) for sequence in decoding.batch.sequences])
        a_round(decoding)

    strategy.step = noted
    return rounds


@pytest.mark.parametrize("sample", [False, True])
def test_ranks_agree_once_a_round(text_model, byte_tokenizer, monkeypatch, sample):
    """Eight answers in four places, of which some end early: by a client, and by a clock. Guards against a
    broadcast for each token and row, and against a rank that goes on with a row that another has ended.
    """
    ranks, config = Ranks(), replace(GREEDY, sample=sample, max_steps=40)
    monkeypatch.setattr("serving.engine.broadcast_from_rank0", ranks.broadcast_from_rank0)
    generators = [tiny_generator(text_model, byte_tokenizer, config) for _ in range(2)]
    mine, others = [noting_rounds(generator.generation_strategy) for generator in generators]
    follower = threading.Thread(target=follow, args=(generators[1], config, 4), name="follower")
    follower.start()
    results = [queue.Queue() for _ in range(8)]

    def leaves(ids, _):
        jobs[1].is_gone = ids.shape[1] > len(PROMPTS[1]) + 8
        return False

    def is_late(ids, _):
        jobs[2].most_seconds = 0 if ids.shape[1] > len(PROMPTS[2]) + 20 else 600
        return False

    criteria = {1: leaves, 2: is_late}
    jobs = []
    for place, to in enumerate(results):
        given = Request(PROMPTS[place % 4], stopping_criteria=criteria.get(place), seed=place, config=config)
        jobs.append(Job(generators[0].prepared(given, config)[0], to.put))
    engine = Running(generators[0].generation_strategy, text_model, config, 4, max_waiting=4)
    engine.submit(jobs)
    ended = [type(to.get(timeout=60)) for to in results]
    assert engine.stop()
    follower.join(60)
    assert not follower.is_alive()
    assert ended[1:3] == [ClientDisconnected, RequestTimeout]
    assert ended[3:] == [GenerationStrategyResult] * 5
    assert mine == others
    assert ranks.times_said <= len(mine) + 8  # at most one round less for each that ends, and the end of all


def test_an_engine_that_fails_tells_all(engine, monkeypatch):
    """Guards against clients that wait for ever, and a server that says it is well."""
    monkeypatch.setattr(engine._scheduler, "pop_finished", failing)
    results = queue.Queue()
    engine.submit([job(prompt, results) for prompt in PROMPTS * 2])
    assert {type(results.get(timeout=60)) for _ in range(8)} == {ServerShutdown}
    assert not engine.is_up
    assert not engine.stop()


def test_waiting_counts_from_a_jobs_arrival(engine):
    """Guards against a time to the first token that leaves out the queue."""
    results, one = queue.Queue(), job([5, 6], queue.Queue())
    with held(engine) as at_rest:
        engine.submit([job(prompt, results) for prompt in PROMPTS])
        assert at_rest.wait(60)
        engine.submit([one])
        now = time.perf_counter()
    for _ in PROMPTS:
        results.get(timeout=60)
    engine.stop()
    assert one.arrived <= now <= one.admitted
