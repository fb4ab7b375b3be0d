"""The prefix cache: answers are those of prefilling every prompt as a whole."""

import threading

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import EOS, tiny_llama, transformers_generate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import DRAFTS, strategy_of
from transformers.models.llama.modeling_llama import LlamaMLP

from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, Request, make_strategy
from self_speculation.generator_base import single_result
from self_speculation.model.captured_runner import capture_decoding, decode_eagerly
from self_speculation.model.fused_layers import fuse
from self_speculation.scheduler import Scheduler

STORY = [5, 9, 4, 7, 3, 3, 8, 21, 22, 30, 6, 11]


def answer(strategy, model, prompt, batch_size=1, request=None, **config):
    name = strategy.name
    config = GenerationConfig(**{"sample": False, "max_steps": 8, "generation_strategy": name, **config})
    request = request or Request(prompt, eos_token_ids=[EOS])
    return single_result(strategy.generate_batch(model, [request], config, batch_size))


def own_llama(**config):
    """One that a test may change."""
    return tiny_llama.__wrapped__(**config)


@given(
    turns=st.lists(st.lists(st.integers(3, 40), min_size=1, max_size=9), min_size=2, max_size=6),
    forgets=st.lists(st.none() | st.integers(0, 30), min_size=6, max_size=6),
    batch_size=st.integers(1, 3),
    drafts=DRAFTS,
    max_steps=st.integers(1, 12),
    agreement=st.sampled_from(["sometimes", "always", "never"]),
    fused=st.booleans(),
)
@settings(max_examples=25)
def test_a_conversation_reads_on(turns, forgets, batch_size, drafts, max_steps, agreement, fused):
    """Guards against keys of rejected drafts, of tokens after the end, of layers that did not run, or of
    another history, where the cached prefix ends.

    forgets: length of the history that the next turn keeps, as a template drops old messages.
    """
    drafts = dict(drafts)
    fused = fused or drafts.get("draft_weights") == "int4"
    model = tiny_llama(agreement=agreement, fused=fused)
    name = strategy_of(drafts)
    keeps, reads = make_strategy(name), make_strategy(name)
    history: list[int] = []
    for turn, cut in zip(turns, forgets, strict=False):
        history = [*history[:cut], *turn]
        settings = {"max_steps": max_steps, "batch_size": batch_size, **drafts}
        kept = answer(keeps, model, history, reuse_cache=True, **settings)
        read = answer(reads, model, history, **settings)
        assert kept.predicted_tokens == read.predicted_tokens
        assert kept.stop_reason == read.stop_reason
        assert (read.num_cached_tokens, kept.num_prompt_tokens) == (0, len(history))
        history += kept.predicted_tokens


@given(
    lengths=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), min_size=3, max_size=14),
    batch_size=st.integers(1, 4),
    drafts=DRAFTS,
    max_steps=st.lists(st.integers(1, 9), min_size=14, max_size=14),
)
@settings(max_examples=15)
def test_rows_take_the_slots_of_those_that_ended(lengths, batch_size, drafts, max_steps):
    """Guards against slots that are mixed up when rows move, and against a row that writes into the slot of a
    cached prefix. Prompts are prefixes of three texts.
    """
    drafts = dict(drafts)
    model = tiny_llama(fused=drafts.get("draft_weights") == "int4")
    texts = [STORY, STORY[:6] + STORY[::-1], [40, *STORY]]
    prompts = [texts[text][:length] for text, length in lengths]
    name = strategy_of(drafts)
    config = GenerationConfig(sample=False, generation_strategy=name, max_steps=9, reuse_cache=True, **drafts)
    ends = [lambda tokens, n=n: len(tokens) >= n for n in max_steps]
    requests = [Request(prompt, ends_text=end) for prompt, end in zip(prompts, ends, strict=False)]
    results = dict(make_strategy(name).generate_batch(model, requests, config, batch_size))
    for index, request in enumerate(requests):
        alone = answer(make_strategy(name), model, None, request=request, max_steps=9, **drafts)
        assert results[index].predicted_tokens == alone.predicted_tokens


def test_only_new_tokens_are_prefilled():
    """Guards against a cache that is not used: it has all but the last token of the history."""
    model, strategy = tiny_llama(), make_strategy("autoregressive")
    first = answer(strategy, model, STORY, reuse_cache=True)
    history = [*STORY, *first.predicted_tokens, 9, 9]
    second = answer(strategy, model, history, reuse_cache=True)
    assert second.num_cached_tokens == len(STORY) + len(first.predicted_tokens) - 1
    again = answer(strategy, model, history, reuse_cache=True)
    assert again.num_cached_tokens == len(history) - 1  # its logits are needed


def test_the_slot_with_the_longest_prefix_is_taken():
    """Guards against a prefix that is overwritten while another slot is free."""
    model = tiny_llama()
    strategy = make_strategy("autoregressive")
    config = GenerationConfig(sample=False, max_steps=3, reuse_cache=True)
    scheduler = Scheduler(strategy, model, config, batch_size=3)

    def cached(*prompts):
        for key, prompt in enumerate(prompts):
            scheduler.add_request(key, Request(prompt))
        results = {}
        while scheduler.batch:
            scheduler.step()
            results |= dict(scheduler.pop_finished())
        return [results[key].num_cached_tokens for key in range(len(prompts))]

    other, third = STORY[::-1], [40] * 6
    assert cached(STORY, other, third) == [0, 0, 0]
    assert cached([*third, 9], [*STORY, 9]) == [6, 12]
    assert cached([*other, 9]) == [12]
    assert cached([41, 42]) == [0]  # takes the least recently used slot: the story's
    assert [cached([*prompt, 9]) for prompt in (third, other, STORY)] == [[6], [12], [0]]


def changed_in_place(model):
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)


def stepped(model):
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.1)


def hooked(model):
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: -output)


def turned_twice_as_fast(model):
    model.model.rotary_emb.inv_freq.mul_(2)


def scaled(model):
    model.model.rotary_emb.attention_scaling = 1.7


def forward_replaced(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda hidden: 3 * type(mlp).forward(mlp, hidden)


class Halves(ModelHook):
    def post_forward(self, module, output):  # noqa: ARG002
        return output / 2


def hooked_by_accelerate(model):
    add_hook_to_module(model.model.layers[1].mlp, Halves())


class Tripled(LlamaMLP):
    def forward(self, hidden):
        return 3 * super().forward(hidden)


def class_swapped(model):
    model.model.layers[1].mlp.__class__ = Tripled


def rows_swapped(model):
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data[[2, 9]] = weight.data[[9, 2]]


def columns_swapped(model):
    weight = model.model.layers[0].mlp.gate_proj.weight
    weight.data[:, [2, 9]] = weight.data[:, [9, 2]]


def one_element(model):
    """The fingerprint may miss it: `fuse` is called."""
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] += 30
    fuse(model)


CHANGES = [changed_in_place, stepped, hooked, fuse, torch.nn.Module.double, turned_twice_as_fast, scaled]
CHANGES += [forward_replaced, hooked_by_accelerate, class_swapped, rows_swapped, columns_swapped, one_element]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_discards_the_cache(change, fused):
    """Guards against keys and values of earlier weights, buffers, numbers or code, also after writes to
    `.data`.
    """
    model, strategy = own_llama(fused=fused), make_strategy("autoregressive")
    answer(strategy, model, STORY, reuse_cache=True)
    change(model)
    after = answer(strategy, model, STORY, reuse_cache=True)
    assert after.num_cached_tokens == 0
    assert after.predicted_tokens == answer(make_strategy("autoregressive"), model, STORY).predicted_tokens
    assert after.predicted_tokens == transformers_generate(model, STORY, 8)


@pytest.mark.parametrize("other", [{"exit_layer": 2}, {"batch_size": 2}])
def test_the_cache_is_for_one_exit_layer_and_batch_size(other):
    """Guards against layers that an early exit did not run, and a cache with too few slots."""
    model, strategy = tiny_llama(), make_strategy("autoregressive")
    answer(strategy, model, STORY, reuse_cache=True, **other)
    after = answer(strategy, model, STORY, reuse_cache=True)
    assert after.num_cached_tokens == 0
    assert after.predicted_tokens == answer(make_strategy("autoregressive"), model, STORY).predicted_tokens


def test_a_failed_request_leaves_no_prefix():
    """Guards against keys of a failed round, or NaN, in a cached prefix."""

    def damages(ids, logits):
        return logits * torch.nan if ids.shape[1] > len(STORY) + 2 else logits

    def fails(ids, logits):
        if ids.shape[1] > len(STORY) + 2:
            raise KeyError("a mistake")
        return logits

    model = tiny_llama()
    wanted = answer(make_strategy("autoregressive"), model, STORY).predicted_tokens
    for processor in (damages, fails):
        strategy = make_strategy("autoregressive")
        with pytest.raises((KeyError, FloatingPointError)):
            answer(strategy, model, None, request=Request(STORY, processor), reuse_cache=True)
        after = answer(strategy, model, STORY, reuse_cache=True)
        assert (after.num_cached_tokens, after.predicted_tokens) == (0, wanted)


def test_an_answer_that_ended_before_its_logits_were_nan_leaves_no_prefix():
    """Guards against a slot that was cleared because of NaN, and is read as a cached prefix."""

    def damages(ids, logits):
        return logits * torch.nan if ids.shape[1] > len(STORY) + 2 else logits

    drafts = {"exit_layer": 2, "num_speculations": 3}
    model, strategy = tiny_llama(agreement="always"), make_strategy("self_speculative")
    wanted = answer(make_strategy("autoregressive"), model, STORY).predicted_tokens
    request = Request(STORY, damages, ends_text=lambda tokens: len(tokens) == 3)
    ended = answer(strategy, model, None, request=request, reuse_cache=True, **drafts)
    assert (ended.predicted_tokens, ended.stop_reason) == (wanted[:3], "stop_word")
    after = answer(strategy, model, STORY, reuse_cache=True, **drafts)
    assert (after.num_cached_tokens, after.predicted_tokens) == (0, wanted)


def test_two_threads_do_not_share_a_cache():
    """Guards against two requests at once in the kept cache of one strategy."""
    model, strategy = tiny_llama(), make_strategy("autoregressive")
    wanted = answer(make_strategy("autoregressive"), model, STORY).predicted_tokens
    answer(strategy, model, STORY, reuse_cache=True)
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(answer(strategy, model, STORY, reuse_cache=True).predicted_tokens)
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 6


@pytest.mark.usefixtures("graphs")
def test_captured_passes_write_to_no_cached_prefix():
    """Guards against the padding rows of a captured pass, which wrote to every free slot."""
    model = own_llama(num_layers=2, fused=True)
    capture_decoding(model)
    try:
        strategy = make_strategy("self_speculative")
        drafts = {"exit_layer": 1, "num_speculations": 2, "batch_size": 3}
        other = [40, *STORY]
        first = answer(strategy, model, STORY, reuse_cache=True, **drafts)
        answer(strategy, model, other, reuse_cache=True, **drafts)
        history = [*STORY, *first.predicted_tokens, 9]
        kept = answer(strategy, model, history, reuse_cache=True, **drafts)
        assert kept.num_cached_tokens >= len(STORY)
        answer(make_strategy("self_speculative"), model, other, **drafts)  # takes the passes and their cache
        after = answer(strategy, model, history, reuse_cache=True, **drafts)
        assert after.num_cached_tokens == 0
    finally:
        decode_eagerly(model)
    read = answer(make_strategy("self_speculative"), model, history, **drafts)
    assert kept.predicted_tokens == after.predicted_tokens == read.predicted_tokens


def test_generate_keeps_its_cache(byte_tokenizer, text_model):
    """Guards against a generator that makes a new cache for every prompt."""
    generator = HuggingfaceLlamaGenerator(byte_tokenizer, text_model, make_strategy("autoregressive"))
    config = GenerationConfig(sample=False, max_steps=4, reuse_cache=True)
    results = [generator.generate("def add(a, b): return", config) for _ in range(2)]
    first, second = (result.generation_strategy_result for result in results)
    assert second.num_cached_tokens == first.num_prompt_tokens - 1
    assert results[0].decoded_prediction == results[1].decoded_prediction
