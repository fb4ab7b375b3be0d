"""Batches: the output of a sequence does not depend on other sequences."""

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import count, cycle, islice

import pytest
import torch
from conftest import EOS, generate, tiny_llama
from distributions import PROMPT as SAMPLED_PROMPT
from distributions import STEPS, expected, p_value
from distributions import config as sampling
from distributions import model as sampled_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MaxLengthCriteria, RepetitionPenaltyLogitsProcessor

from self_speculation import (
    GenerationConfig,
    HuggingfaceLlamaGenerator,
    Request,
    make_strategy,
    self_speculation_generator,
)
from self_speculation.decoding.batch import Batch
from self_speculation.model import model_runner
from self_speculation.model.attention_context import AttentionContext
from self_speculation.model.captured_runner import capture_decoding
from self_speculation.model.kv_cache import KVCache
from self_speculation.scheduler import Scheduler

SAMPLES = 800
PROMPTS = [[5, 9, 4], [7], [3, 3, 8, 3, 3, 8, 3], [6, 4, 11, 30, 12], [9, 8, 7, 6, 5, 4, 3, 9, 8], [21, 22]]


def strategy_of(config):
    if "num_speculations" in config:
        return "self_speculative"
    return config.pop("strategy", "autoregressive")


def in_batch(model, requests, batch_size, **config):
    """Results by index."""
    name = strategy_of(config)
    settings = GenerationConfig(**{"sample": False, "generation_strategy": name, **config})
    return dict(make_strategy(name).generate_batch(model, requests, settings, batch_size))


def alone(model, request, **config):
    if request.seed is not None:
        torch.manual_seed(request.seed)
    return generate(
        model,
        request.prompt,
        eos=request.eos_token_ids or [],
        logits_processors=request.logits_processors,
        stopping_criteria=request.stopping_criteria,
        **config,
    )


def assert_as_if_alone(model, requests, batch_size, **config):
    results = in_batch(model, requests, batch_size, **config)
    assert sorted(results) == list(range(len(requests)))
    for index, request in enumerate(requests):
        solo, mine = alone(model, request, **config), results[index]
        assert mine.predicted_tokens == solo.predicted_tokens
        assert (mine.stop_reason, mine.end_token_id) == (solo.stop_reason, solo.end_token_id)
        if config.get("strategy") != "adaptive":  # whose drafts depend on time
            assert mine.drafts_by_source == solo.drafts_by_source
            assert mine.accepted_by_position == solo.accepted_by_position


DRAFTS = st.one_of(
    st.just({"strategy": "adaptive"}),
    st.just({}),
    st.fixed_dictionaries({"exit_layer": st.integers(1, 3)}),
    st.fixed_dictionaries(
        {"exit_layer": st.integers(1, 3), "num_speculations": st.integers(1, 20)},
        optional={
            "prompt_lookup": st.integers(1, 3),
            "draft_confidence": st.sampled_from(["auto", "0.05", "0.5"]),
            "draft_weights": st.just("int4"),
            "draft_vocabulary": st.integers(1, 40),
        },
    ),
)


@given(
    prompts=st.lists(st.lists(st.integers(3, 40), min_size=1, max_size=12), min_size=1, max_size=7),
    batch_size=st.integers(1, 5),
    drafts=DRAFTS,
    max_steps=st.integers(1, 24),
    ends=st.lists(st.integers(2, 49), max_size=6),
    penalties=st.lists(st.none() | st.floats(0.5, 2.0), min_size=7, max_size=7),
    stops_at=st.lists(st.none() | st.integers(1, 9), min_size=7, max_size=7),
    sample=st.booleans(),
    agreement=st.sampled_from(["sometimes", "always", "never"]),
    fused=st.booleans(),
)
@settings(max_examples=45)
def test_every_row_is_as_if_alone(
    prompts, batch_size, drafts, max_steps, ends, penalties, stops_at, sample, agreement, fused
):
    """Guards against slots, masks, lengths, random numbers, processors or stop conditions of other rows. More
    prompts than rows: rows are replaced in every order.
    """
    fused = fused or drafts.get("draft_weights") == "int4"
    if sample and "strategy" in drafts:
        sample = False  # its decisions depend on time, and so do its draws
    requests = [
        Request(
            prompt,
            eos_token_ids=ends,
            logits_processors=[RepetitionPenaltyLogitsProcessor(penalty)] if penalty else None,
            stopping_criteria=[MaxLengthCriteria(len(prompt) + at)] if at else None,
            seed=index,
        )
        for index, (prompt, penalty, at) in enumerate(zip(prompts, penalties, stops_at, strict=False))
    ]
    model = tiny_llama(agreement=agreement, fused=fused)
    assert_as_if_alone(model, requests, batch_size, max_steps=max_steps, sample=sample, **drafts)


class Says:
    """A processor that forces the tokens of a list, cyclically; None: the model's own token."""

    def __init__(self, prompt, tokens):
        self._start, self._tokens = len(prompt), tokens

    def __call__(self, ids, logits):
        token = self._tokens[(ids.shape[1] - self._start) % len(self._tokens)]
        if token is None:
            return logits
        return torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)


def test_rows_that_accept_all_and_nothing_and_something():
    """Guards against a rollback by the same number of tokens for all rows."""
    model = tiny_llama(agreement="never")
    said = cycle([[5, 6, 7], [None], [9, 8, None]])
    requests = [
        Request(prompt, logits_processors=[Says(prompt, tokens)])
        for prompt, tokens in zip(PROMPTS, said, strict=False)
    ]
    shared = {"exit_layer": 2, "num_speculations": 4, "max_steps": 21}
    assert_as_if_alone(model, requests, 3, **shared)
    results = in_batch(model, requests, 3, **shared)
    rates = [results[index].acceptance_rate for index in range(3)]
    assert rates[:2] == [1.0, 0.0]
    assert 0 < rates[2] < 1


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("drafts", [{}, {"exit_layer": 2, "num_speculations": 6}])
def test_a_row_at_the_end_of_its_context(drafts, sample):
    """Guards against positions beyond the context, and a full row that shortens outputs of other rows."""
    model, settings = tiny_llama(max_position_embeddings=32), {"max_steps": 100, "sample": sample, **drafts}
    requests = [Request([3 + i % 40 for i in range(n)], seed=n) for n in (31, 4, 25, 30, 1)]
    assert_as_if_alone(model, requests, 3, **settings)
    assert {r.stop_reason for r in in_batch(model, requests, 3, **settings).values()} == {"context"}


@pytest.mark.parametrize("drafts", [{}, {"exit_layer": 2, "num_speculations": 3}])
def test_logits_that_are_no_numbers_are_the_rows_own(drafts):
    """Guards against NaN of another row that passes a mask, or stays in a slot."""
    model = copy.deepcopy(tiny_llama())
    with torch.no_grad():
        model.model.embed_tokens.weight[49] = torch.nan
    good = [Request(prompt) for prompt in PROMPTS]
    bad = Request([4, 49, 5])
    late = Request(
        [4, 6], logits_processors=[lambda ids, logits: logits if ids.shape[1] < 6 else logits * torch.nan]
    )
    for broken in (bad, late):
        strategy = make_strategy(strategy_of(dict(drafts)))
        config = GenerationConfig(sample=False, generation_strategy=strategy.name, max_steps=20, **drafts)
        got = dict(strategy.generate_batch(model, [good[0], broken, *good[1:3]], config, batch_size=4))
        assert str(got.pop(1)).startswith("the model's logits are not numbers")
        got = {index: result.predicted_tokens for index, result in got.items()}
        assert got == {
            index: alone(model, good[max(0, index - 1)], max_steps=20, **drafts).predicted_tokens
            for index in (0, 2, 3)
        }
    cache = KVCache(1, 8, num_rows=2)
    cache.clear(0)
    for value in (torch.nan, 1.0):
        row = cache.row(cache.num_rows)
        row.append(torch.full((3, 1, 2), value), torch.full((3, 1, 2), value), 0)
        cache.add_row(3)
    cache.remove_row(0, damaged=True)
    held, _ = cache.buffers.of_layers[0]
    assert not held.isnan().any()


def test_a_damaged_row_that_has_failed_already_leaves_no_damage():
    """Guards against NaN in a slot whose request failed with its own error first."""
    model = copy.deepcopy(tiny_llama())
    with torch.no_grad():
        model.model.embed_tokens.weight[49] = torch.nan

    def fails(*_):
        raise KeyError("its own")

    prompts = [[5, 9, 4, 7, 7, 3, 8, 8], [7, 8]]
    broken = Request([4, 49, *[5] * 30], logits_processors=[fails])
    first, second = (Request(prompt) for prompt in prompts)
    got = in_batch(model, [first, broken, second], 2, max_steps=8)
    assert isinstance(got.pop(1), KeyError)
    expected = [alone(model, request, max_steps=8).predicted_tokens for request in (first, second)]
    assert [got[index].predicted_tokens for index in (0, 2)] == expected


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("lookup", [0, 2])
def test_drafts_are_padded_with_a_token_that_the_row_has(lookup, sample, monkeypatch):
    """Guards against padding by a token that may put NaN into the cache."""
    seen, rooms, of_target = [], Batch.draft_limits, self_speculation_generator.target_logits

    def target_logits(runner, batch, draft):
        for row, length in enumerate(draft.lengths):
            seen.append((draft.sources[row], int(batch.last[row]), draft.tokens[row, length:].tolist()))
        return of_target(runner, batch, draft)

    def shorter_by_row(batch, k, wanted=None):
        return [min(room, 5 - 2 * row) for row, room in enumerate(rooms(batch, k, wanted))]

    monkeypatch.setattr(Batch, "draft_limits", shorter_by_row)
    monkeypatch.setattr(self_speculation_generator, "target_logits", target_logits)
    model = tiny_llama(agreement="always", exit_layer=0)
    config = GenerationConfig(
        sample=sample, temperature=0.1, max_steps=20, exit_layer=2, num_speculations=5, prompt_lookup=lookup,
        generation_strategy="self_speculative",
    )  # fmt: skip
    requests = [Request(prompt, seed=1) for prompt in PROMPTS]
    dict(make_strategy("self_speculative").generate_batch(model, requests, config, batch_size=3))
    sources = {"exit 2", "lookup"} if lookup else {"exit 2"}
    assert {source for source, _, padding in seen if padding} == sources
    assert all({*padding} <= {last} for _, last, padding in seen)


def test_slots_are_reused_as_soon_as_they_are_free():
    """Guards against a batch that waits for its slowest row, and prompts that are read early."""
    asked = []

    def requests():
        for index, prompt in enumerate(islice(cycle(PROMPTS), 9)):
            asked.append(index)
            yield Request(prompt, logits_processors=[Says(prompt, [9] * (20 if index == 0 else 3) + [EOS])],
                          eos_token_ids=[EOS])  # fmt: skip

    config = GenerationConfig(sample=False, max_steps=40)
    order = []
    for index, _ in make_strategy("autoregressive").generate_batch(tiny_llama(), requests(), config, 2):
        order.append(index)
        assert len(asked) <= len(order) + 2
    assert order[:4] == [1, 2, 3, 4]  # while the first goes on
    assert sorted(order) == list(range(9))


def test_texts_and_seeds_and_streamers(byte_tokenizer, text_model):
    """Guards against texts, stop words, random numbers or streams of another prompt."""

    class Collects:
        def __init__(self):
            self.ids, self.ended = [], 0

        def put(self, ids):
            self.ids += ids.tolist()

        def end(self):
            self.ended += 1

    generator = HuggingfaceLlamaGenerator(byte_tokenizer, text_model, make_strategy("self_speculative"))
    config = GenerationConfig(
        max_steps=20, exit_layer=2, num_speculations=3, temperature=1.0, stop_words=["e"]
    )
    texts = ["def add", "Once upon a time", "naïve", "", "class Stop:"]
    streamers = [Collects() for _ in texts]
    prompts = [
        Request(text, streamer=streamer, seed=i)
        for i, (text, streamer) in enumerate(zip(texts, streamers, strict=True))
    ]
    results = dict(generator.generate_batch(prompts, config, batch_size=2))
    for index, text in enumerate(texts):
        torch.manual_seed(index)
        solo = generator.generate(text, config)
        assert results[index].decoded_prediction == solo.decoded_prediction
        tokens = results[index].generation_strategy_result.predicted_tokens
        assert tokens == solo.generation_strategy_result.predicted_tokens == streamers[index].ids
        assert streamers[index].ended == 1
    assert [index for index, _ in generator.generate_batch(texts, config, batch_size=1)] == [0, 1, 2, 3, 4]


def test_what_is_wrong_with_a_prompt_is_its_own_result(byte_tokenizer, text_model):
    """Guards against answers that are lost because another prompt is invalid."""
    generator = HuggingfaceLlamaGenerator(byte_tokenizer, text_model, make_strategy("autoregressive"))
    config = GenerationConfig(max_steps=9, sample=False)
    with pytest.raises(ValueError, match="the prompt has the token id 1000000"):
        generator.generate([10**6], config)
    # A negative id is no token either, though it is below all of them.
    unknown = (([10**6], "has the token id 1000000"), ([5, -1], "has the token id -1"))
    for wrong, why in (*unknown, ([4] * 256, "has 256 tokens")):
        prompts = [[5, 6], [7, 8, 9], wrong, [5]]
        for batch_size in (1, 2, 3):
            got = dict(generator.generate_batch(prompts, config, batch_size))
            assert str(got.pop(2)).startswith(f"the prompt {why}")
            assert {index: answer.decoded_prediction for index, answer in got.items()} == {
                index: generator.generate(prompts[index], config).decoded_prediction for index in (0, 1, 3)
            }
    # Another type is an error of its own; the first answer's time includes the setup.
    got = dict(generator.generate_batch([None, [5, 6]], config, batch_size=2))
    assert isinstance(got[0], TypeError)
    result = got[1].generation_strategy_result
    assert result.prefill_time + result.decode_time <= got[1].total_time
    with pytest.raises(ValueError, match="batch_size 0: must be at least 1"):
        next(generator.generate_batch(["x"], config, batch_size=0))


class Fails:
    """A processor, a criterion or a streamer that raises after some tokens."""

    def __init__(self, after):
        self.left = after

    def __call__(self, ids, scores):  # noqa: ARG002
        self.left -= 1
        if self.left < 0:
            raise KeyError("its own")
        return scores

    def put(self, ids, is_draft=False):
        self(ids, is_draft)

    def delete(self, num_tokens, is_draft=False):
        """Nothing is shown."""

    def end(self):
        """Nothing is shown."""


def failing_criterion(after):
    fails = Fails(after)
    return lambda ids, scores: torch.tensor([fails(ids, scores) is None])


@pytest.mark.parametrize("drafts", [{}, {"exit_layer": 2, "num_speculations": 3}, {"strategy": "adaptive"}])
@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("logits_processors", Fails),
        ("stopping_criteria", failing_criterion),
        ("streamer", Fails),
    ],
)
def test_a_request_that_raises_takes_no_other_along(part, kind, after, drafts):
    """Guards against an error of one request that ends other requests."""
    model, prompts = tiny_llama(), [[5, 9, 4], [7, 8], [3, 3, 8]]
    broken = Request([9, 9], **{part: kind(after)})
    requests = [Request(prompts[0]), broken, *map(Request, prompts[1:])]
    got = in_batch(model, requests, 2, max_steps=12, **drafts)
    assert isinstance(got.pop(1), KeyError)
    solo = [alone(model, Request(prompt), max_steps=12).predicted_tokens for prompt in prompts]
    assert [got[index].predicted_tokens for index in (0, 2, 3)] == solo
    with pytest.raises(KeyError, match="its own"):
        generate(model, [9, 9], eos=[], max_steps=12, **{part: kind(after)}, **drafts)


class Shown(list):
    """A streamer: the ids that stand on a screen, drafts among them."""

    def put(self, ids, is_draft=False):  # noqa: ARG002
        self.extend(ids.tolist())

    def delete(self, num_tokens, is_draft=False):  # noqa: ARG002
        del self[-num_tokens:]

    def end(self):
        """What is shown stays."""


def raises_from(length):
    """A processor that raises where a history has so many ids."""

    def process(ids, logits):
        if ids.shape[1] >= length:
            raise KeyError("its own")
        return logits

    return process


DRAFTED = {"exit_layer": 2, "num_speculations": 3, "max_steps": 12}


@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup": 1}, {"draft_vocabulary": 9, "sample": True}])
@pytest.mark.parametrize("agreement", ["always", "sometimes"])
def test_an_error_of_a_processor_belongs_to_its_position(drafts, agreement):
    """Guards against an output that ends because of an error at a rejected token, and one that goes on after
    an error at an accepted token. The streamer shows all tokens before the error.
    """
    model, drafts = tiny_llama(agreement=agreement), {**DRAFTED, **drafts}
    requests = [Request(prompt, seed=row) for row, prompt in enumerate(PROMPTS[:4])]
    plain = {row: result.predicted_tokens for row, result in in_batch(model, requests, 4, **drafts).items()}
    prompt, tokens = PROMPTS[0], plain[0]
    for num in (0, 1, 2, 5, 7, 11):
        shown, raises = Shown(), [raises_from(len(prompt) + num)]
        request = Request(prompt, raises, seed=0, streamer=shown)
        got = in_batch(model, [request, *requests[1:]], 4, **drafts)
        assert isinstance(got.pop(0), KeyError)
        assert shown == tokens[:num]
        assert {row: result.predicted_tokens for row, result in got.items()} == {
            row: plain[row] for row in (1, 2, 3)
        }
        ends = Request(prompt, raises, seed=0, ends_text=lambda found, num=num: len(found) == num)
        if num:
            assert in_batch(model, [ends], 1, **drafts)[0].predicted_tokens == tokens[:num]


@pytest.mark.parametrize("num", [1, 2, 6])
def test_a_guess_that_agrees_with_logits_that_are_no_numbers(num):
    """Guards against an output that goes on, or ends with id 0, where draft and target are both NaN: checking
    the last position is not enough.
    """
    model, shown, at = tiny_llama(agreement="always"), Shown(), len(PROMPTS[0]) + num
    tokens = alone(model, Request(PROMPTS[0]), **DRAFTED).predicted_tokens
    damages = [lambda ids, logits: logits * torch.nan if ids.shape[1] == at else logits]
    request = Request(PROMPTS[0], damages, streamer=shown, eos_token_ids=[0])
    got = in_batch(model, [request, Request(PROMPTS[1])], 2, **DRAFTED)
    assert isinstance(got[0], FloatingPointError)
    assert shown == tokens[:num]
    assert got[1].predicted_tokens == alone(model, Request(PROMPTS[1]), **DRAFTED).predicted_tokens


def test_a_processor_that_returns_another_shape_takes_no_other_row_along():
    """Guards against logits that cannot be stacked with those of other rows."""
    wrong = Request(PROMPTS[0], [lambda ids, logits: logits[:, :7] if ids.shape[1] > 8 else logits])
    got = in_batch(tiny_llama(), [wrong, Request(PROMPTS[1])], 2, **DRAFTED)
    assert isinstance(got[0], RuntimeError)
    assert got[1].predicted_tokens == alone(tiny_llama(), Request(PROMPTS[1]), **DRAFTED).predicted_tokens


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_batch_goes_on_after_a_round_that_was_broken_off(num_rows, monkeypatch):
    """Guards against random numbers, keys and values of a failed round in later requests."""

    def out_of_memory(*_):
        raise MemoryError

    drafts = {"exit_layer": 2, "num_speculations": 3, "sample": True, "temperature": 1.0, "max_steps": 8}
    strategy = make_strategy("self_speculative")
    going = Scheduler(strategy, tiny_llama(), GenerationConfig(**drafts), batch_size=2)
    for key in range(num_rows):
        going.add_request(key, Request(PROMPTS[key], seed=key))
    with monkeypatch.context() as patches:
        patches.setattr("self_speculation.self_speculation_generator.target_logits", out_of_memory)
        with pytest.raises(MemoryError) if num_rows > 1 else nullcontext():
            going.step()
    assert all(isinstance(error, MemoryError) for _, error in going.pop_finished())
    requests = {key: Request(PROMPTS[key], seed=key) for key in (3, 4)}
    got = {}
    for key, request in requests.items():
        going.add_request(key, request)
    while going.batch:
        going.step()
        got |= going.pop_finished()
    for key, request in requests.items():
        assert got[key].predicted_tokens == alone(tiny_llama(), request, **drafts).predicted_tokens


def test_a_prompt_that_finds_no_memory_leaves_it_to_the_others(monkeypatch):
    """Guards against a cache that is sized for the longest earlier prompt."""
    monkeypatch.setattr("self_speculation.model.kv_cache.free_memory", lambda *_: 4 * 2**20)
    model = tiny_llama(max_position_embeddings=200_000)
    requests = [Request(prompt) for prompt in ([3] * 9000, PROMPTS[0], [3] * 9000, PROMPTS[1])]
    got = in_batch(model, requests, 2, max_steps=5)
    assert [isinstance(got[index], MemoryError) for index in range(4)] == [True, False, True, False]
    for index in (1, 3):
        assert got[index].predicted_tokens == alone(model, requests[index], max_steps=5).predicted_tokens


def test_room_for_no_more_than_the_rows_can_reach(monkeypatch):
    """Guards against a cache that doubles beyond the longest possible sequence, or beyond that of a finished
    row.
    """
    monkeypatch.setattr("self_speculation.model.model_runner._FIRST_ALLOCATION", 32)
    config = GenerationConfig(sample=False, max_steps=200)
    going = Scheduler(make_strategy("autoregressive"), tiny_llama(), config, batch_size=2)
    going.add_request("ends early", Request([3], stopping_criteria=[lambda ids, logits: ids.shape[1] > 9]))
    going.add_request("is long", Request([7], config=replace(config, max_steps=60)))
    capacities, ended = set(), {}
    while going.batch:
        going.step()
        capacities.add(going._decoding.runner.cache.capacity)
        ended |= going.pop_finished()
    assert capacities == {24, 48, 64}
    assert [len(result.predicted_tokens) for result in ended.values()] == [9, 60]


def test_slots_are_not_swapped_without_reuse_cache(monkeypatch):
    """Guards against copies of a removed row that nothing reads."""
    monkeypatch.setattr(KVCache, "swap", lambda *_: pytest.fail("swapped"))
    assert_as_if_alone(tiny_llama(), [Request(prompt) for prompt in PROMPTS], 3, max_steps=5)


def test_a_batch_driven_by_hand(monkeypatch):
    """Guards against idle time that counts as the first request's, a prompt without a free slot, and an
    endless loop without rows.
    """
    strategy, config = make_strategy("autoregressive"), GenerationConfig(sample=False, max_steps=2)
    seconds, waited = count(), [0]  # a clock that goes on by a second whenever somebody looks at it
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds) + waited[0])
    going = Scheduler(strategy, tiny_llama(), config, batch_size=1)
    waited[0] = 10**6  # until somebody asks for something
    going.add_request("first", Request(PROMPTS[0]))
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        going.add_request("second", Request(PROMPTS[1]))
    going.step()
    [(key, result)] = going.pop_finished()
    assert key == "first"
    assert 0 < result.prefill_time < 10**6
    with pytest.raises(ValueError, match="batch_size 0: must be at least 1"):
        list(strategy.generate_batch(tiny_llama(), [Request(PROMPTS[0])], config, batch_size=0))


@pytest.mark.parametrize("drafts", [{}, {"exit_layer": 2, "num_speculations": 3}, {"strategy": "adaptive"}])
def test_captured_passes(drafts, graphs):
    """Guards against passes of one row that are used for several, and a cache that is too small."""
    model = copy.deepcopy(tiny_llama(max_position_embeddings=4096))
    requests = [Request(prompt) for prompt in [*PROMPTS, [3 + i % 40 for i in range(1200)], [4, 5]]]
    solo = [alone(model, request, max_steps=12).predicted_tokens for request in requests]
    capture_decoding(model)
    for size in (3, 1, 3):
        results = in_batch(model, requests, size, max_steps=12, **drafts)
        assert [results[index].predicted_tokens for index in range(len(requests))] == solo
    assert graphs.replayed


@pytest.mark.parametrize("length", [1, model_runner.PREFILL_CHUNK + 1])
@pytest.mark.usefixtures("graphs")
def test_the_last_piece_of_a_prompt_is_one_token(length):
    """Guards against a captured pass over it at a wrong position."""
    model = copy.deepcopy(tiny_llama(max_position_embeddings=2048))
    request = Request([3 + 7 * i % 40 for i in range(length)])
    expected = alone(model, request, max_steps=12).predicted_tokens
    capture_decoding(model)
    for drafts in ({}, {"exit_layer": 2, "num_speculations": 3}):
        assert alone(model, request, max_steps=12, **drafts).predicted_tokens == expected


SAMPLED_DRAFTS = [{}, {"exit_layer": 1, "num_speculations": 2}]
SAMPLED_DRAFTS += [{**SAMPLED_DRAFTS[1], "draft_vocabulary": 1}]


@pytest.mark.parametrize("drafts", SAMPLED_DRAFTS, ids=["plain", "drafted", "short vocabulary"])
def test_the_distribution_of_sampled_rows(drafts):
    """Rows with the same prompt and different seeds. False alarm: 1e-4 for each of two tests, fixed seeds."""
    name = "self_speculative" if drafts else "autoregressive"
    config = sampling(**{"generation_strategy": name, "exit_layer": -1, "num_speculations": -1, **drafts})
    requests = [Request(SAMPLED_PROMPT, seed=seed) for seed in range(SAMPLES)]
    results = dict(make_strategy(name).generate_batch(sampled_model(), requests, config, 4))
    tokens = [tuple(results[index].predicted_tokens[:STEPS]) for index in range(SAMPLES)]
    likely = expected(config, [])
    assert p_value(Counter(tokens), likely) > 1e-4
    # Neighbours are independent.
    first = Counter()
    for key, p in likely.items():
        first[key[0]] += p
    pairs = Counter(zip((t[0] for t in tokens[::2]), (t[0] for t in tokens[1::2]), strict=False))
    assert p_value(pairs, {(a, b): p * q for a, p in first.items() for b, q in first.items()}) > 1e-4


@pytest.mark.usefixtures("graphs")
def test_batches_that_are_taken_from_in_turn():
    """Guards against generations that share a cache: eager ones have their own, captured ones raise."""
    model, strategy = copy.deepcopy(tiny_llama()), make_strategy("autoregressive")
    config = GenerationConfig(sample=False, max_steps=12)
    requests = [Request(prompt) for prompt in PROMPTS]
    solo = {i: alone(model, request, max_steps=12).predicted_tokens for i, request in enumerate(requests)}
    both = [strategy.generate_batch(model, requests, config, batch_size=2) for _ in range(2)]
    for results in zip(*both, strict=True):
        assert all(result.predicted_tokens == solo[index] for index, result in results)
    capture_decoding(model)
    short = Request(PROMPTS[0], ends_text=lambda tokens: len(tokens) == 3)  # while the next one goes on
    first = strategy.generate_batch(model, [short, *requests], config, batch_size=2)
    second = strategy.generate_batch(model, requests, config, batch_size=2)
    next(first)
    assert {index: result.predicted_tokens for index, result in second} == solo
    errors = [str(result) for _, result in first if isinstance(result, RuntimeError)]
    assert errors
    assert "let one end before the next begins" in errors[0]


def see_everything(monkeypatch):
    """No row is masked beyond its own end."""
    ragged = AttentionContext.ragged

    def unmasked(runner, positions, length):
        context = ragged(runner, positions, length)
        mask = torch.zeros(len(positions), 1, positions.shape[1], length)
        context.make_mask = lambda copies: mask.repeat(1, 1, copies, 1)
        return context

    monkeypatch.setattr(AttentionContext, "ragged", unmasked)


def one_offset(monkeypatch):
    """All rows are where the first one is."""
    positions = KVCache.positions
    monkeypatch.setattr(KVCache, "positions", lambda *args: positions(*args)[:1].expand(args[0].num_rows, -1))


def zeroed_slots(monkeypatch):
    """What is rejected is not masked, but zeros: a zero key still takes its share of the softmax."""
    rollback = KVCache.rollback

    def zeroing(cache, counts):
        for row, number in enumerate(counts):
            end = cache.length(0, row)
            for part in (part for held in cache.buffers.of_layers for part in held):
                part[row, :, end - number :] = 0
        rollback(cache, counts)

    see_everything(monkeypatch)
    monkeypatch.setattr(KVCache, "rollback", zeroing)


@pytest.mark.parametrize("fault", [see_everything, one_offset, zeroed_slots])
def test_faults_are_found(fault, monkeypatch):
    """The comparisons above detect classic mistakes."""
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        assert_as_if_alone(
            tiny_llama(), [Request(p) for p in PROMPTS], 3, exit_layer=2, num_speculations=3, max_steps=20
        )
