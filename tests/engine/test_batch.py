"""Batches: slots, memory, errors and callbacks of sequences. Answers are in test_same_answers.py."""

from contextlib import nullcontext
from operator import length_hint
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    LAYERS,
    drained,
    generator_of,
    ids_of,
    in_batch,
    mixed_drafts,
    needs_operators,
    own_llama,
    scheduler_of,
    tiny_llama,
)

from self_speculation import GenerationConfig, Request, fuse, make_strategy
from self_speculation.backends.kv_cache import KVCache
from self_speculation.engine import batch
from self_speculation.requests.sequence import Sequence

PROMPTS = [[5, 9, 4], [7], [3, 3, 8, 3, 3, 8, 3], [6, 4, 11, 30, 12], [9, 8, 7, 6, 5, 4, 3, 9, 8], [21, 22]]


def tokens_alone(model, prompts, **config):
    return [ids_of(model, prompt, **config) for prompt in prompts]


def raises_from(length):
    """A processor that raises where a history has so many ids."""

    def process(ids, logits):
        if ids.shape[1] >= length:
            raise KeyError("of the streamer")
        return logits

    return process


def nan_from(length):
    """A processor that returns NaN where a history has so many ids."""
    return lambda ids, logits: logits * torch.nan if ids.shape[1] >= length else logits


# A fourth token would be the id whose embedding is NaN, which the row then has in the pass.
THREE = {**LAYERS, "num_speculations": 3}


@pytest.mark.parametrize(("drafts", "late"), [({}, False), ({}, True), (THREE, False)])
@pytest.mark.parametrize(
    "broken", [Request([4, 49, *[5] * 30]), Request([4, 49, *[5] * 30], raises_from(1))], ids=["NaN", "error"]
)
@pytest.mark.parametrize("batch_size", [2, 4])
def test_nan_stays_in_its_row(batch_size, broken, drafts, late, monkeypatch):
    """Guards against NaN that a mask lets through to another row, or that stays in a slot, and against drafts
    that are padded with a token that the row does not have.
    """
    monkeypatch.setattr(batch, "queues_passes", lambda device: late)
    model = own_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[[0, 49]] = torch.nan
    requests = [Request(prompt) for prompt in PROMPTS[:4]]
    with mixed_drafts() if drafts else nullcontext():
        got = in_batch(model, [requests[0], broken, *requests[1:]], batch_size, max_steps=9, **drafts)
    assert str(got.pop(1)).startswith(("the model's logits are not numbers", "'of the streamer'"))
    found = [got[index].predicted_tokens for index in sorted(got)]
    assert found == tokens_alone(model, PROMPTS[:4], max_steps=9, **drafts)


def ends_at(length):
    return lambda tokens: len(tokens) == length


def test_slots_are_reused_as_soon_as_they_are_free():
    """Guards against a batch that waits for the slowest row, and against prompts that are read early."""
    lengths = iter([30, *[4] * 8])
    requests = (Request(PROMPTS[0], stop_checks=ends_at(length)) for length in lengths)
    config = GenerationConfig(sample=False, max_steps=40)
    order = []
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


def loud_llama(token):
    """A model whose values of one token, in the first layer, are beyond the range of float16."""
    model = own_llama(agreement="often")
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 0
        embedding[token] = torch.eye(len(embedding[0]))[0] * embedding.norm(dim=1).mean()
        model.model.layers[0].self_attn.v_proj.weight[:, 0] = 1e5
        model.model.layers[0].self_attn.o_proj.weight *= 1e-5
    return model


@pytest.mark.parametrize("is_fused", [pytest.param(True, marks=needs_operators), False])
def test_values_beyond_float16_are_an_error_of_their_row(is_fused):
    """Guards against infinite values, which make answers of nothing without an error, against an error that
    reaches another row or comes from a drafted token that is rejected, and an error without the position.
    """
    loud = 9
    model = loud_llama(loud)
    if is_fused:
        fuse(model)
    prompts = [[5, 6, 7, loud, 8], [5, 8, 6], [4, 4]]
    for dtype in ("float16", "bfloat16"):
        settings = {"max_steps": 6, "cache_dtype": dtype}
        expected = [in_batch(model, [Request(prompt)], 1, **settings)[0] for prompt in prompts]
        assert isinstance(expected[0], FloatingPointError) == (dtype == "float16")
        if dtype == "float16":
            assert str(expected[0]).startswith(
                "cache_dtype float16: a key or value at position 3 of prompt and answer is beyond 65504; "
            )
            expected[0] = None
        answers = [None if each is None else each.predicted_tokens for each in expected]
        for way in ({}, {**LAYERS, "prompt_lookup": 2}):
            wrong = [loud] if is_fused else []  # torch's masks do not keep NaN out of earlier tokens
            requests = [
                Request(prompt, prediction=answer and [*answer[:2], *wrong, *answer[2:]])
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            scheduler = scheduler_of(model, 2, reuse_cache=True, **settings, **way)
            for key, request in enumerate(requests):
                scheduler.add_request(key, request)
            found = drained(scheduler)
            assert answers == [
                None if isinstance(found[key], FloatingPointError) else found[key].predicted_tokens
                for key in range(3)
            ]


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_batch_goes_on_after_a_round_that_was_broken_off(num_rows, monkeypatch):
    """Guards against noise, keys and values of a failed round in later requests, and against a
    prefix that it may have written to.
    """

    def out_of_memory(*_):
        raise MemoryError

    drafts = {**LAYERS, "sample": True, "temperature": 1.0, "max_steps": 8, "reuse_cache": True}
    model = tiny_llama()
    requests = [Request(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    scheduler = scheduler_of(model, 3, **drafts)
    scheduler.add_request(3, requests[3])  # leaves a prefix
    drained(scheduler)
    for key in range(num_rows):
        scheduler.add_request(key, requests[key])
    with monkeypatch.context() as patches:
        patches.setattr("self_speculation.self_speculation_generator.verify", out_of_memory)
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
    monkeypatch.setattr("self_speculation.backends.buffers.free_memory", lambda *_: 4 * 2**20)
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
    model = tiny_llama()
    prompts = {"decodes": [9, 9, 9], "is read": [*range(3, 40)], "joins": [5, 6, 7]}
    scheduler = scheduler_of(model, 3, token_budget=4)
    working = getattr(owner, name)

    def out_of_memory(first, *args, **kwargs):
        if owner is torch and first[0].dtype != torch.long:  # not the rows' last tokens
            return working(first, *args, **kwargs)
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
        lambda: scheduler.cancel({row.request_id for row in scheduler.batch.sequences if row.stop_reason})
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


def test_the_first_error_of_a_round_counts():
    """Guards against a NaN behind it, which adds tokens that nothing has judged, against an error of the
    streamer that takes the place of the batch, and against NaN in the slot that later rounds make forget.
    """
    streamer = Mock(spec=["put", "end"], end=Mock(side_effect=ValueError))
    request = Request([5, 6], raises_from(3), streamer=streamer)
    sequence = Sequence(request, GenerationConfig(max_steps=9), 99, torch.device("cpu"))
    logits = sequence.process(torch.zeros(3, 50), 0)
    sequence.check([0.0, 0.0, torch.nan])
    sequence.commit([7, 8, 9], logits)
    assert (sequence.output_ids, type(sequence.result())) == ([7], KeyError)
    sequence.check([0.0])
    assert sequence.is_damaged


def test_logits_are_for_criteria_alone():
    """Guards against a view of the logits of each token, which took half of the host's time in a round, and
    against a criterion that sees those of another row.
    """
    seen = []
    met = Mock(side_effect=lambda ids, scores: bool(seen.append((ids[0].tolist(), scores.tolist()))))
    logits = torch.arange(6.0)[:, None]
    for criteria in (None, met):
        request = Request([5, 6], stopping_criteria=criteria)
        sequence = Sequence(request, GenerationConfig(max_steps=2), 99, torch.device("cpu"))
        sequence.commit([7, 8, 9], Mock(spec=[]) if criteria is None else logits, first=3)
        assert (sequence.output_ids, sequence.error, sequence.stop_reason) == ([7, 8], None, "max_steps")
    assert seen == [([5, 6, 7], [[3.0]]), ([5, 6, 7, 8], [[4.0]])]


def test_an_error_of_a_draft_alone_does_not_count():
    """Guards against an error for logits of an early exit, in a round whose verification has none."""

    def process(_, logits):
        if logits.any():
            raise KeyError
        return logits

    sequence = Sequence(Request([5, 6], process), GenerationConfig(max_steps=9), 99, torch.device("cpu"))
    sequence.process(torch.ones(1, 50), 0)
    sequence.commit([7, 8], sequence.process(torch.zeros(2, 50), 0), num_drafted=1)
    assert (sequence.output_ids, sequence.error) == ([7, 8], None)
