"""Rounds that are replays of graphs, of which the host reads each one after it has queued the next one."""

import itertools
import random
from threading import Thread

import pytest
import torch
from conftest import (
    COPY,
    LAYERS,
    card_llama,
    config_of,
    drained,
    ids_of,
    in_batch,
    mixed_drafts,
    scheduler_of,
    ways,
)
from cuda_graphs import decode_eagerly

from self_speculation import Request
from self_speculation.backends.captures import CapturedPasses
from self_speculation.backends.runners import capture_decoding
from self_speculation.engine import replayed_rounds
from self_speculation.engine.replayed_rounds import Round
from self_speculation.engine.scheduler import Scheduler
from self_speculation.models.model_cache import release

WAYS = {"plain": {}, "early exit": {"exit_layer": 2}, "layers": LAYERS, "copy": COPY}


@pytest.fixture
def queued(graphs, monkeypatch):  # noqa: ARG001
    """The host reads late. Returns whether each round went on from one that was unread."""
    for user in ("engine.batch", "drafts.composer"):
        monkeypatch.setattr(f"self_speculation.{user}.queues_passes", lambda device: True)
    can_continue = Round.can_continue
    found = []

    def seen(*args):
        found.append(can_continue(*args))
        return found[-1]

    monkeypatch.setattr(Round, "can_continue", seen)
    return found


def ends(output):
    return sum(output[-3:]) % 19 == 0


# What ends an answer, besides a limit.
ENDINGS = ({}, {"eos_token_ids": [7, 19, 33]}, {"stop_checks": ends}, {"drafts": False}, {})


# Where prompts begin alike: two blocks of positions and more, one block and more, and none.
SYSTEM = [3 + 7 * i * i % 47 for i in range(135)]
BEGINNINGS = [SYSTEM, SYSTEM[:70], SYSTEM, [], SYSTEM, SYSTEM[:64]]


def draw_request(draws, way, beginning):
    """Every third one samples, with rules that filter or without."""
    rules = {
        "sample": draws.random() < 0.6, "temperature": draws.choice([0.3, 1.2]),
        "top_k": draws.choice([0, 0, 20]), "top_p": draws.choice([0.9, 1.0]),
        "min_p": draws.choice([0.0, 0.0, 0.05]),
    }  # fmt: skip
    config = config_of(max_steps=draws.choice([3, 40, 60]), reuse_cache=True, **rules, **way)
    prompt = [draws.randrange(3, 50) for _ in range(draws.choice([1, 3, 7, 20, 31]))]
    return Request([*beginning, *prompt], seed=draws.randrange(100), config=config, **draws.choice(ENDINGS))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ways(*WAYS))
def test_answers_that_are_read_late(name, seed, queued):
    """Rows of many lengths and settings join, end and are cancelled. Guards against positions, limits, ids,
    rules or noise of another row, step or round where the card moves on by itself, and against a round whose
    row has ended but gets the tokens. Prompts begin alike: guards against positions that rows read together
    where the slot has another text by now, or that are not theirs.
    """
    draws = random.Random(seed)
    way = WAYS[name]
    model = card_llama(4, agreement="often")
    requests = {key: draw_request(draws, way, beginning) for key, beginning in enumerate(BEGINNINGS)}
    expected = in_batch(model, requests.values(), 1, **way)
    capture_decoding(model)
    scheduler = scheduler_of(model, 3, reuse_cache=True, **way)
    waiting = [*requests.items()]
    found = {}
    prefix_reads = set()
    with mixed_drafts() if "num_speculations" in way else torch.no_grad():
        for step in itertools.count():
            if not (waiting or scheduler.has_requests):
                break
            if waiting and scheduler.num_free_slots:
                scheduler.add_request(*waiting.pop(0))
            scheduler.step()
            if step == 6:
                scheduler.cancel([scheduler.batch.sequences[0].request_id])
            found |= scheduler.pop_finished()
            prefix_reads.add((*scheduler._ensure_inputs().cache.buffers.prefix_reads.tolist(),))
    for key, result in expected.items():
        tokens = result.predicted_tokens
        if found[key].stop_reason == "cancelled":
            tokens = tokens[: len(found[key].predicted_tokens)]
        else:
            assert found[key].stop_reason == result.stop_reason
        assert found[key].predicted_tokens == tokens, key
    assert sum(result.stop_reason == "cancelled" for result in found.values()) == 1
    assert sum(queued) >= 4
    assert len(prefix_reads) > 2  # none, and several
    assert any(result.num_cached_tokens >= 64 for result in found.values())


@pytest.mark.usefixtures("queued")
def test_positions_that_rows_read_together(monkeypatch):
    """Rows share one block, or none though the second one is the same. Guards against rows that read another
    text: of a row that has moved, of a block that follows another one, or behind the prompt; and against keys
    and values that are read for each row.
    """
    model = card_llama(4, agreement="often")
    other = SYSTEM[::-1]
    prompts = [SYSTEM, [*SYSTEM[:100], 5], [*SYSTEM[:100], 5], [*other[:64], *SYSTEM[64:]]]
    steps = [9, 30, 30, 50]
    requests = [
        Request(prompt, seed=seed, config=config_of(max_steps=number, sample=True, reuse_cache=True))
        for seed, (prompt, number) in enumerate(zip(prompts, steps, strict=True))
    ]
    expected = in_batch(model, requests, 1)
    capture_decoding(model)
    scheduler = scheduler_of(model, 4, reuse_cache=True)
    cache = scheduler._ensure_inputs().cache
    for key, request in enumerate(requests):
        scheduler.add_request(key, request)
    seen = set()
    decode = Scheduler._decode

    def without_copies(scheduler):
        """Rows that read positions of another slot have none of their own."""
        source, *lengths = cache.buffers.prefix_reads.tolist()
        seen.add((*sorted(lengths),))
        spoilt = [(row, length) for row, length in enumerate(lengths) if length and row != source]
        parts = [part[row, :, :length] for part in cache.buffers.all() for row, length in spoilt]
        numbers = [part.clone() for part in parts]
        for part in parts:
            part.fill_(torch.nan)
        decode(scheduler)
        for part, before in zip(parts, numbers, strict=True):
            part.copy_(before)

    monkeypatch.setattr(Scheduler, "_decode", without_copies)
    found = drained(scheduler)
    assert {(0, 0, 0, 0), (0, 64, 64, 64), (0, 0, 64, 64)} <= seen, seen
    for key, result in found.items():
        assert result.predicted_tokens == expected[key].predicted_tokens, key


@pytest.mark.parametrize("budget", [None, 300])
def test_a_cache_that_grows_between_two_rounds(budget, queued):
    """Guards against a replay over the keys and values that rows had before a prompt, also one that is read
    in pieces while the rows decode.
    """
    model = card_llama(4, agreement="often", max_position_embeddings=4096)
    requests = [Request([5, 9, 4], seed=0), Request([5 + i % 40 for i in range(1100)], seed=1)]
    config = {"max_steps": 60, "sample": True, **LAYERS}
    expected = in_batch(model, requests, 1, **config)
    capture_decoding(model)
    scheduler = scheduler_of(model, 2, budget, **config)
    scheduler.add_request(0, requests[0])
    for _ in range(5):
        scheduler.step()
    assert scheduler.batch.queued_round is not None
    scheduler.add_request(1, requests[1])
    found = drained(scheduler)
    assert [found[key].predicted_tokens for key in found] == [expected[key].predicted_tokens for key in found]
    assert sum(queued) > 10


def test_a_row_that_outgrows_the_memory(queued, monkeypatch):
    """Guards against keys that a replay writes beyond the end of a cache, which memory keeps short of the
    longest answer.
    """
    model = card_llama(4, agreement="often", max_position_embeddings=4096)
    capture_decoding(model)
    free = itertools.chain([100 * 2 * 4 * 64 * 4], itertools.repeat(0))  # at first for 100 positions
    monkeypatch.setattr("self_speculation.backends.buffers.free_memory", lambda device: next(free))
    monkeypatch.setattr("self_speculation.backends.captures._STEP", 64)
    scheduler = scheduler_of(model, 1, max_steps=2000, **LAYERS)
    scheduler.add_request(0, Request([5, 9, 4]))
    (error,) = drained(scheduler).values()
    assert isinstance(error, MemoryError)
    buffers = scheduler._ensure_inputs().cache.buffers
    assert buffers.capacity == 64
    assert sum(queued) > 5


def test_a_kept_prefix(queued):
    """Guards against a prefix that a round has written to after the row had ended."""
    model = card_llama(4, agreement="often")
    capture_decoding(model)
    for end in (7, 19, 33):
        scheduler = scheduler_of(model, 2, max_steps=40, reuse_cache=True, **LAYERS)
        scheduler.add_request(0, Request([5, 9, 4, 7], eos_token_ids=[end]))
        (result,) = drained(scheduler).values()
        longer = [5, 9, 4, 7, *result.predicted_tokens, 8, 3]
        scheduler.add_request(1, Request(longer))
        (again,) = drained(scheduler).values()
        assert again.num_cached_tokens >= len(longer) - 3
        decode_eagerly(model)
        assert again.predicted_tokens == ids_of(model, longer, max_steps=40)
        capture_decoding(model)
    assert sum(queued) > 5


def test_a_thread_that_ends_between_two_captures_of_a_round(queued, monkeypatch):
    """Guards against a round with one graph of before, whose workspace is gone."""
    model = card_llama(4, agreement="often")
    capture_decoding(model)
    expected = ids_of(model, **LAYERS)
    release(model)
    capture = CapturedPasses.capture_part
    begin = replayed_rounds._begin
    ended = [Thread()]
    rounds = []

    def capture_beside_a_thread(passes, *args):
        replay = capture(passes, *args)
        passes._threads |= {ended.pop()} if ended else set()
        return replay

    def recorded(*args):
        made = begin(*args)
        rounds.append({part for part, *_ in made.graphs})
        return made

    monkeypatch.setattr(CapturedPasses, "capture_part", capture_beside_a_thread)
    monkeypatch.setattr(replayed_rounds, "_begin", recorded)
    assert ids_of(model, **LAYERS) == expected
    assert not ended
    assert queued
    assert all({"draft", "verify"} <= parts for parts in rounds)


def test_a_weight_that_is_written_between_two_answers(queued):
    """Guards against a graph over weights of before."""
    model = card_llama(4, agreement="often")
    capture_decoding(model)
    before = ids_of(model, **LAYERS)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    after = ids_of(model, **LAYERS)
    assert sum(queued) > 2
    decode_eagerly(model)
    assert ids_of(model) == after != before
