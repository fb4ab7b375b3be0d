"""Batches: the output of a sequence does not depend on other sequences."""

from collections import deque
from contextlib import nullcontext
from itertools import count
from operator import length_hint

import pytest
import torch
from conftest import (
    ADAPTIVE,
    LAYERS,
    Recorder,
    drained,
    generator_of,
    ids_of,
    in_batch,
    mixed_drafts,
    own_llama,
    scheduler_of,
    tiny_llama,
)
from helpers import watch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import MaxLengthCriteria

import self_speculation
from self_speculation import GenerationConfig, Request, make_strategy
from self_speculation.decoding import batch
from self_speculation.passes.kv_cache import KVCache

PROMPTS = [[5, 9, 4], [7], [3, 3, 8, 3, 3, 8, 3], [6, 4, 11, 30, 12], [9, 8, 7, 6, 5, 4, 3, 9, 8], [21, 22]]


def together(model, requests, batch_size, budget=None, cancelled=None, **config):
    """Results by index. With a budget all requests are added before the first step.

    cancelled: a step and the index of a request.
    """
    scheduler = scheduler_of(model, batch_size, budget, **config)
    waiting, results, ended = deque(enumerate(requests)), {}, {}
    for step in count():
        while waiting and (budget or scheduler.num_free_slots):
            scheduler.add_request(*waiting.popleft())
        if cancelled and cancelled[0] == step:
            scheduler.cancel({cancelled[1]})
            rows = scheduler.batch.sequences
            ended = {row.key: [*row.tokens] for row in rows if row.stop_reason == "cancelled"}
        scheduler.step()
        results |= scheduler.pop_finished()
        if not (waiting or scheduler.has_requests):
            assert scheduler.num_free_slots == batch_size
            assert all(results[key].predicted_tokens == tokens for key, tokens in ended.items())
            return results


def tokens_alone(model, prompts, **config):
    return [ids_of(model, prompt, **config) for prompt in prompts]


DRAFTS = st.one_of(
    st.just(ADAPTIVE),
    st.just({}),
    st.fixed_dictionaries({"exit_layer": st.integers(1, 3)}),
    st.fixed_dictionaries(
        {"exit_layer": st.integers(1, 3), "num_speculations": st.integers(1, 20)},
        optional={
            "prompt_lookup": st.integers(1, 3),
            "draft_weights": st.just("int4"),
        },
    ),
)


OWN = st.fixed_dictionaries(
    {"max_steps": st.integers(1, 24)},
    optional={
        "sample": st.booleans(),
        "temperature": st.sampled_from([0.5, 1.3]),
        "top_k": st.sampled_from([1, 5]),
        "top_p": st.sampled_from([0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.5]),
        "no_repeat_ngram_size": st.just(1),
        "stop_token_ids": st.lists(st.integers(2, 49), max_size=6),
    },
)
TEXT = [5, 9, 4, 7, 3, 3, 8, 21, 22, 30, 6, 11]


def raises_from(length):
    """A processor that raises where a history has so many ids."""

    def process(ids, logits):
        if ids.shape[1] >= length:
            raise KeyError("its own")
        return logits

    return process


def fails_from(length):
    """A stopping criterion that raises where a history has so many ids, and is never met before."""
    process = raises_from(length)
    return lambda ids, logits: process(ids, logits) is None


def meddles(how, part):
    """A processor that, after some histories, raises, returns NaN or leaves one token."""

    def process(ids, logits):
        chance = int(ids.sum())
        if chance % 7 != part:
            return logits
        if how == "raises":
            raise KeyError(how)
        if how == "NaN":
            return logits * torch.nan
        return torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor([chance % 50]), 1.0)

    return process


MEDDLES = st.builds(meddles, st.sampled_from(["raises", "NaN", "one"]), st.integers(0, 6))
CRITERIA = st.builds(MaxLengthCriteria, st.integers(2, 20)) | st.builds(fails_from, st.integers(2, 16))
ROW = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(3, 40), min_size=1, max_size=12)
        | st.integers(4, 12).map(lambda n: TEXT[:n]),
        "own": st.none() | OWN,
        "processors": st.just([]) | st.just([]) | st.lists(MEDDLES, max_size=2),
        "criterion": st.none() | st.none() | CRITERIA,
        "puts": st.sampled_from([99, 99, 99, 0, 1, 5]),  # of the streamer, before it raises
        "drafts": st.sampled_from([True, True, False]),
    }
)
NGRAMS = {
    "rows": [
        {"prompt": PROMPTS[2], "own": None, "processors": [], "criterion": None, "puts": 99, "drafts": True}
    ],
    "batch_size": 1, "budget": None, "config": {"max_steps": 24, "reuse_cache": False},
    "drafts": {**LAYERS, "prompt_lookup": 1}, "ends": [], "fused": False, "context": 256, "late": False,
    "cancelled": None,
}  # fmt: skip


@mixed_drafts("n-grams")
@given(
    rows=st.lists(ROW, min_size=1, max_size=7),
    batch_size=st.integers(1, 5),
    budget=st.sampled_from([None, None, 1, 4, 9]),
    config=st.fixed_dictionaries({"max_steps": st.integers(1, 24), "reuse_cache": st.booleans()}),
    drafts=DRAFTS,
    ends=st.lists(st.integers(2, 49), max_size=6),
    sample=st.booleans(),
    agreement=st.sampled_from(["sometimes", "always", "never", "loops"]),
    fused=st.booleans(),
    context=st.sampled_from([20, 256]),
    late=st.booleans(),
    cancelled=st.none() | st.tuples(st.integers(0, 12), st.integers(0, 6)),
)
@example(**NGRAMS, sample=False, agreement="loops")  # accepted
@example(**NGRAMS, sample=True, agreement="sometimes")  # rejected
@settings(max_examples=120)
def test_every_row_is_as_if_alone(
    rows, batch_size, budget, config, drafts, ends, sample, agreement, fused, context, late, cancelled
):
    """Guards against slots, masks, lengths, noise, settings, processors or stop conditions of other rows,
    against a row at the end of its context that shortens others, against a chunk of a prompt at a wrong
    position, and against a cached prefix that another row overwrites. Rows are replaced in every order, and
    one is cancelled: guards against keys that stay behind, and a token that it still gets, or others lose. On
    a GPU tokens are read late: guards against a pass too many that shows.

    Rows fail: guards against an error that reaches another row, also that of a streamer, against a drafted
    token that ends or changes an output because processors raise or change logits there, against an output
    that goes on where draft and target are both NaN, and against a streamer that does not show all tokens
    before an error.
    """
    model = tiny_llama(agreement=agreement, fused=fused, max_position_embeddings=context)
    config |= {"sample": sample}

    def request(index, puts):
        row = rows[index]
        own = row["own"] and GenerationConfig(**row["own"])
        calls = row["processors"], row["criterion"], Recorder(puts)
        return Request(
            row["prompt"], *calls, seed=index, eos_token_ids=ends, config=own, drafts=row["drafts"]
        )

    requests = [request(index, row["puts"]) for index, row in enumerate(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "reads_late", lambda device: late)
        results = together(model, requests, batch_size, budget, cancelled, **config, **drafts)
    assert sorted(results) == list(range(len(requests)))
    for index, mine in results.items():
        own = requests[index]
        if own.streamer.has_raised:
            assert isinstance(mine, KeyError)
            continue
        plainly = [{}] if drafts.keys() & {"num_speculations", "generation_strategy"} else []
        for how in (drafts, *plainly):
            other = request(index, puts=99)
            alone, decided = in_batch(model, [other], 1, **config, **how)[0], other.streamer.decided
            if not isinstance(mine, Exception) and mine.stop_reason == "cancelled":
                assert cancelled[1] == index
                assert own.streamer.decided == mine.predicted_tokens == decided[: len(mine.predicted_tokens)]
                continue
            assert (own.streamer.decided, own.streamer.drafts) == (decided, [])
            assert type(mine) is type(alone)
            if isinstance(mine, Exception):
                continue
            assert mine.predicted_tokens == decided
            assert (mine.stop_reason, mine.end_token_id) == (alone.stop_reason, alone.end_token_id)
            assert own.drafts or not mine.num_drafted
            if how == drafts != ADAPTIVE:
                assert mine.draft_stats == alone.draft_stats


def nan_from(length):
    """A processor that returns NaN where a history has so many ids."""
    return lambda ids, logits: logits * torch.nan if ids.shape[1] >= length else logits


# A fourth token would be the id whose embedding is NaN, which the row then has in its pass.
THREE = {**LAYERS, "num_speculations": 3}


@pytest.mark.parametrize(("drafts", "late"), [({}, False), ({}, True), (THREE, False)])
@pytest.mark.parametrize(
    "broken",
    [Request([4, 49, *[5] * 30]), Request([4, 6], nan_from(6)), Request([4, 49, *[5] * 30], raises_from(1))],
    ids=["prompt", "later", "prompt, after an error"],
)
@pytest.mark.parametrize("batch_size", [2, 4])
def test_nan_stays_in_its_row(batch_size, broken, drafts, late, monkeypatch):
    """Guards against NaN that a mask lets through to another row, or that stays in a slot, and against drafts
    that are padded with a token that the row does not have.
    """
    monkeypatch.setattr(batch, "reads_late", lambda device: late)
    model = own_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[[0, 49]] = torch.nan
    requests = [Request(prompt) for prompt in PROMPTS[:4]]
    with mixed_drafts() if drafts else nullcontext():
        got = in_batch(model, [requests[0], broken, *requests[1:]], batch_size, max_steps=9, **drafts)
    assert str(got.pop(1)).startswith(("the model's logits are not numbers", "'its own'"))
    found = [got[index].predicted_tokens for index in sorted(got)]
    assert found == tokens_alone(model, PROMPTS[:4], max_steps=9, **drafts)


@pytest.mark.parametrize("drafts", [{"generation_strategy": "autoregressive", "exit_layer": -1}, THREE])
def test_rows_do_not_see_beyond_their_end(drafts):
    """Guards against a mask that huge keys outweigh."""
    prompts = [PROMPTS[1], PROMPTS[4]]
    scheduler = scheduler_of(model := tiny_llama(), 2, max_steps=9, **drafts)
    for row, prompt in enumerate(prompts):
        scheduler.add_request(row, Request(prompt))
    with torch.inference_mode():
        for part in scheduler._prepared.cache.buffers.all():
            for row, prompt in enumerate(prompts):
                part[row, :, len(prompt) :] = 1e6 * torch.randn_like(part[row, :, len(prompt) :]).sign()
    got = drained(scheduler)
    assert [got[row].predicted_tokens for row in range(2)] == tokens_alone(
        model, prompts, max_steps=9, **drafts
    )


def ends_at(length):
    return lambda tokens: len(tokens) == length


def test_slots_are_reused_as_soon_as_they_are_free():
    """Guards against a batch that waits for its slowest row, and against prompts that are read early."""
    lengths = iter([30, *[4] * 8])
    requests = (Request(PROMPTS[0], stop_checks=ends_at(length)) for length in lengths)
    config, order = GenerationConfig(sample=False, max_steps=40), []
    for index, _ in make_strategy("autoregressive").generate_batch(tiny_llama(), requests, config, 2):
        order.append(index)
        assert length_hint(lengths) >= 9 - len(order) - 2
    assert order == [*range(1, 9), 0]


@pytest.fixture
def generator(byte_tokenizer, text_model):
    return generator_of(byte_tokenizer, text_model)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ([10**6], "has the token id 1000000"), ([5, -1], "has the token id -1"),
        ([4] * 256, "has 256 tokens"),
        (["a", "b"], "must be a text or a list of token ids"), (torch.tensor([[1, 2]]), "must be a text"),
    ],
)  # fmt: skip
def test_an_invalid_prompt_is_its_own_result(wrong, why, generator):
    """Guards against answers that are lost because another prompt is invalid."""
    config = GenerationConfig(max_steps=9, sample=False)
    with pytest.raises(ValueError, match=why):
        generator.generate(wrong, config)
    prompts = [[5, 6], [7, 8, 9], wrong, [5], None]
    for batch_size in (1, 2, 3):
        got = dict(generator.generate_batch(prompts, config, batch_size))
        assert str(got.pop(2)).startswith(f"the prompt {why}")
        assert isinstance(got.pop(4), ValueError)
        for index, answer in got.items():
            assert answer.decoded_prediction == generator.generate(prompts[index], config).decoded_prediction


def test_no_rows(generator):
    """Guards against an endless loop."""
    assert list(generator.generate_batch([], GenerationConfig(), batch_size=2)) == []
    with pytest.raises(ValueError, match="batch_size 0: must be at least 1"):
        next(generator.generate_batch(["x"], GenerationConfig(), batch_size=0))


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_batch_goes_on_after_a_round_that_was_broken_off(num_rows, monkeypatch):
    """Guards against noise, keys and values of a failed round in later requests, and against a
    prefix that it may have written to.
    """

    def out_of_memory(*_):
        raise MemoryError

    drafts = {**LAYERS, "sample": True, "temperature": 1.0, "max_steps": 8, "reuse_cache": True}
    model, requests = tiny_llama(), [Request(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    scheduler = scheduler_of(model, 3, **drafts)
    scheduler.add_request(3, requests[3])  # leaves a prefix
    drained(scheduler)
    for key in range(num_rows):
        scheduler.add_request(key, requests[key])
    with monkeypatch.context() as patches:
        patches.setattr("self_speculation.self_speculation_generator.target_logits", out_of_memory)
        with pytest.raises(MemoryError) if num_rows > 1 else nullcontext():
            scheduler.step()
    assert all(isinstance(error, MemoryError) for _, error in scheduler.pop_finished())
    for key in (3, 4):
        scheduler.add_request(key, requests[key])
    with mixed_drafts():
        results = drained(scheduler)
    for key, result in results.items():
        alone = in_batch(model, [requests[key]], 1, **drafts)[0]
        assert (result.predicted_tokens, result.num_cached_tokens) == (alone.predicted_tokens, 0)


def test_a_prompt_that_finds_no_memory_leaves_it_to_the_others(monkeypatch):
    """Guards against a cache that is sized for the longest earlier prompt."""
    monkeypatch.setattr("self_speculation.passes.kv_cache.free_memory", lambda *_: 4 * 2**20)
    model = tiny_llama(max_position_embeddings=200_000)
    requests = [Request(prompt) for prompt in ([3] * 9000, PROMPTS[0], [3] * 9000, PROMPTS[1])]
    got = in_batch(model, requests, 2, max_steps=5)
    assert [isinstance(got[index], MemoryError) for index in range(4)] == [True, False, True, False]
    assert [got[index].predicted_tokens for index in (1, 3)] == tokens_alone(model, PROMPTS[:2], max_steps=5)


@pytest.mark.parametrize(("owner", "name"), [(KVCache, "swap"), (torch, "cat")], ids=["slot", "row"])
def test_a_prompt_that_finds_no_memory_to_join_fails_alone(owner, name, monkeypatch):
    """Guards against a row of the batch without a slot, and a slot without a row, which ended all requests of
    a scheduler.
    """
    model, prompts = tiny_llama(), {"decodes": [9, 9, 9], "is read": [*range(3, 40)], "joins": [5, 6, 7]}
    scheduler, working = scheduler_of(model, 3, token_budget=4), getattr(owner, name)

    def out_of_memory(first, *others, **kwargs):
        if owner is torch and first[0].dtype != torch.long:  # not the rows' last tokens
            return working(first, *others, **kwargs)
        monkeypatch.setattr(owner, name, working)
        raise torch.OutOfMemoryError

    for key in prompts:
        scheduler.add_request(key, Request(prompts[key]))
        scheduler.step()
        if key == "decodes":  # the next one that joins has no memory
            monkeypatch.setattr(owner, name, out_of_memory)
    got = drained(scheduler)
    assert isinstance(got.pop("joins"), torch.OutOfMemoryError)
    alone = tokens_alone(model, [prompts[key] for key in got], max_steps=12)
    assert [result.predicted_tokens for result in got.values()] == alone


class Calls:
    """A streamer, a stop check and a criterion that calls a function."""

    def __init__(self, call):
        self._call = call

    def put(self, _):
        self._call()

    def __call__(self, *_):
        return self._call() or False

    def end(self):
        self._call()


@pytest.mark.parametrize("budget", [None, 2])
@pytest.mark.parametrize("callback", ["streamer", "stop_checks", "stopping_criteria"])
@pytest.mark.parametrize("drafts", [{}, LAYERS])
def test_a_callback_may_cancel(callback, budget, drafts):
    """Guards against a row that is dropped while it joins the batch, and a reason that is overwritten, also
    of a row that has ended.
    """
    model = tiny_llama()
    scheduler = scheduler_of(model, 3, budget, max_steps=20, **drafts)
    cancels = Calls(lambda: scheduler.cancel({"cancels", "waits"}))
    cancels_what_has_ended = Calls(
        lambda: scheduler.cancel({row.key for row in scheduler.batch.sequences if row.stop_reason})
    )
    scheduler.add_request("stays", Request(PROMPTS[0], streamer=cancels_what_has_ended))
    scheduler.add_request("waits", Request(PROMPTS[4]))
    scheduler.add_request("cancels", Request(PROMPTS[2], **{callback: cancels}))
    found = drained(scheduler)
    expected = dict(zip(("stays", "cancels", "waits"), tokens_alone(model, PROMPTS[:5:2]), strict=True))
    ends = {key: result.stop_reason for key, result in found.items()}
    assert ends == {"stays": "max_steps", "cancels": "cancelled", "waits": "cancelled"}
    assert found["stays"].predicted_tokens == expected["stays"]
    assert found["cancels"].predicted_tokens == expected["cancels"][:1]
    assert scheduler.num_free_slots == 3


def test_times_of_setup_and_idleness(monkeypatch):
    """Guards against idle time in a prefill time, and against a setup that counts for each request."""
    passed, setup, idle, ticks = [0.0], 1e6, 1e9, count()
    monkeypatch.setattr("time.perf_counter", lambda: sum(passed) + next(ticks))  # no clock of the machine
    watch(monkeypatch, self_speculation.scheduler, "make_runner", lambda _: passed.append(setup))
    scheduler = scheduler_of(tiny_llama(), batch_size=2)
    passed.append(idle)
    for key in (0, 1):
        scheduler.add_request(key, Request(PROMPTS[0]))
    first, second = (result.prefill_time for _, result in sorted(drained(scheduler).items()))
    assert 0 < second < setup < first < idle


def test_batches_that_are_taken_from_in_turn():
    """Guards against generations that share a cache. Captured ones do, see test_captured_runner.py."""
    model, strategy = tiny_llama(), make_strategy("autoregressive")
    config = GenerationConfig(sample=False, max_steps=12)
    requests = [Request(prompt) for prompt in PROMPTS]
    solo = dict(enumerate(tokens_alone(model, PROMPTS, max_steps=12)))
    both = [strategy.generate_batch(model, requests, config, batch_size=2) for _ in range(2)]
    for results in zip(*both, strict=True):
        assert all(result.predicted_tokens == solo[index] for index, result in results)
