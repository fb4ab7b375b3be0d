"""Captured passes: the ids of eager ones, one capture per shape, and no captures that CUDA refuses."""

import contextlib
import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from conftest import assert_close, drained, generate, in_batch, strategy_name, tiny_llama
from cuda_graphs import CaptureError
from test_llama_model_utils import family
from torch.nn.functional import scaled_dot_product_attention
from transformers import RepetitionPenaltyLogitsProcessor

from self_speculation import GenerationConfig, Request, make_strategy
from self_speculation.model import attention, captured_runner, model_runner
from self_speculation.model.attention_context import AttentionContext
from self_speculation.model.captured_runner import (
    capture_decoding,
    decode_eagerly,
)
from self_speculation.model.families import AttentionType
from self_speculation.model.fused_layers import fuse
from self_speculation.model.model_runner import PREFILL_CHUNK, forward
from self_speculation.model.runners import make_runner
from self_speculation.scheduler import Scheduler

PROMPT = [5, 9, 4, 7, 7, 3]
DRAFTS = {"exit_layer": 1, "num_speculations": 6}
SETTINGS = {
    "autoregressive": {},
    "early exit": {"exit_layer": 1},
    "self-speculative": DRAFTS,
    "n-grams": {**DRAFTS, "prompt_lookup": 2},
    "confidence": {**DRAFTS, "draft_confidence": 0.2},
    "processors": {**DRAFTS, "logits_processors": [RepetitionPenaltyLogitsProcessor(1.3)]},
    "short vocabulary": {**DRAFTS, "draft_vocabulary": 20},
    "copy": {"exit_layer": 2, "num_speculations": 3, "draft_weights": "int4"},
    "adaptive": {"strategy": "adaptive"},
    "adaptive copy": {"strategy": "adaptive", "draft_weights": "int4"},
}


def own_llama(fused=True, num_layers=2, **config):
    model = copy.deepcopy(tiny_llama(num_layers, **config))
    if fused:
        fuse(model)
    return model


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        *((name, True) for name in SETTINGS),
        *((name, False) for name in ("autoregressive", "early exit", "self-speculative", "adaptive")),
        *(
            pytest.param(name, False, marks=pytest.mark.slow)
            for name in ("n-grams", "confidence", "processors", "short vocabulary")
        ),
    ],
)
def test_the_same_ids(name, fused, graphs):
    """Guards against positions, lengths or copies that are constants of a graph, results that are read after
    the next replay, and padding that is attended to.
    """
    model = own_llama(fused)
    runs = [{**SETTINGS[name], "max_steps": 20, "eos": []}]
    if not name.startswith("adaptive"):  # it picks by time, so a seed does not reproduce it
        runs.append({**runs[0], "sample": True, "temperature": 0.7, "top_p": 0.9})

    def answers():
        torch.manual_seed(0)
        prompts = (PROMPT, [8, 3])
        return [generate(model, prompt, **run).predicted_tokens for prompt in prompts for run in runs]

    expected = answers()
    capture_decoding(model)
    assert answers() == expected
    num_captured = len(graphs.captured)
    assert answers() == expected
    assert len(graphs.replayed) > num_captured > 0
    assert name.startswith("adaptive") or len(graphs.captured) == num_captured


def test_keys_read_are_those_there_are(graphs):
    """Guards against passes that read a cache to its end, most of it padding, short answers that are slower
    after a long prompt, and a capture for each length.
    """
    model = own_llama(num_layers=3, max_position_embeddings=4096)
    capture_decoding(model)
    capacities, num_captured = [], []
    for length in (10, 300, PREFILL_CHUNK + 1, 3000, 11, 700, 3000):
        for exit_layer, k in ((1, 3), (2, 3), (2, 6)):
            graphs.replayed.clear()
            prompt = [5 + i % 40 for i in range(length)]
            generate(model, prompt, exit_layer=exit_layer, num_speculations=k, max_steps=9, eos=[])
            for *_, num_keys in graphs.replayed:
                assert length < num_keys <= (max(256, 2 * (length + 9)) if length < 1000 else length + 520)
        capacities.append(make_runner(model).new_cache(1, 1).passes.capacity)
        num_captured.append(len(graphs.captured))
    assert capacities == [1024, 1024, 2048, *[4096] * 4]
    assert num_captured[-1] == num_captured[-2]  # all shapes were there
    assert max(Counter(graphs.captured[num_captured[2] :]).values()) == 2  # two ranges of each depth


def efficient_attention(query, key, value, bias, log_sums, dropout, is_causal, scale):
    """What the kernel computes. Log-sums have room for a multiple of 32 queries."""
    assert dropout == 0.0
    scores = query @ key.mT * scale
    if bias is not None:
        scores = scores + bias
        assert bias.shape == scores.shape
    if is_causal:
        scores = scores + torch.full(scores.shape[2:], -30_000.0).triu(1)
    scores = scores * math.log2(math.e)  # where the least float32 overflows
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp2(scores - largest)
    total = weights.sum(-1, keepdim=True)
    sums = (largest + total.log2())[..., 0] / math.log2(math.e)
    room = torch.full((*sums.shape[:2], -sums.shape[2] % 32), torch.nan, dtype=sums.dtype)
    return weights @ value / total, torch.cat((sums, room), -1) if log_sums else None


@pytest.mark.parametrize(
    ("rows", "heads", "width", "window"), [(1, 2, 3, None), (3, 1, 1, None), (2, 3, 5, None), (2, 2, 3, 100)]
)
def test_attention_in_chunks(rows, heads, width, window, monkeypatch):
    """Guards against chunks of another row or head, weights of padding, -inf of masked chunks, and copies of
    keys.
    """
    torch.manual_seed(0)
    read = []
    operator = lambda *args, **scale: read.extend(args[1:3]) or efficient_attention(*args, **scale)  # noqa: E731
    monkeypatch.setattr(attention, "efficient_attention", operator)
    length, groups = 6 * attention.CHUNK, 2
    positions = torch.randint(0, length - width, (rows, 1)) // 3 + torch.arange(width)
    runner = make_runner(own_llama())
    runner._rotary.reserve(length)
    runner.kernel = attention.AttentionKernel.EFFICIENT
    kind = AttentionType(window)
    context = AttentionContext.ragged(runner, kind, positions, length, splits_keys=True)
    keys, values = torch.randn(2, rows + 1, heads, length + 50, 8)[:, :rows, :, :length].unbind()
    queries = torch.randn(rows, heads, groups * width, 8)
    expected = scaled_dot_product_attention(queries, keys, values, context.mask(groups), scale=0.3)
    mask = context.mask_of_chunks(groups, heads)
    found = attention.attend_in_chunks(queries, keys, values, mask, 0.3)
    assert_close(found, expected, roundings=8)
    assert {part.untyped_storage().data_ptr() for part in read} == {keys.untyped_storage().data_ptr()}


@pytest.mark.parametrize("drafts", [{}, DRAFTS])
def test_long_texts_in_chunks(drafts, graphs, monkeypatch):
    """Guards against chunks in layers that are captured: of several rows, and where the text passes 1,024."""
    model = own_llama(max_position_embeddings=4096)
    prompts = [[5 + i % 40 for i in range(length)] for length in (1020, 1100, 9)]
    requests = [Request(prompt) for prompt in prompts]
    shared = {"max_steps": 9, "batch_size": 3, **drafts}
    expected = in_batch(model, requests, **shared)
    efficient, seen = attention.AttentionKernel.EFFICIENT, []
    monkeypatch.setattr(model_runner, "attention_kernel", lambda *_: efficient)

    def noted(query, key, *others, **scale):
        seen.append(key.shape[2])
        return efficient_attention(query, key, *others, **scale)

    monkeypatch.setattr(attention, "efficient_attention", noted)
    capture_decoding(model)
    found = in_batch(model, requests, **shared)
    assert all(found[index].predicted_tokens == expected[index].predicted_tokens for index in found)
    assert 1536 in {num_keys for *_, num_keys in graphs.replayed}
    assert attention.CHUNK in seen


@pytest.mark.parametrize("name", ["autoregressive", "n-grams", "copy", "adaptive", "adaptive copy"])
@pytest.mark.parametrize("token_budget", [None, 8])
def test_all_passes_are_captured_beforehand(name, token_budget, graphs):
    """Guards against a request that waits for a capture: for more rows, a wider draft or a longer text; and
    against a chunk of a prompt in the slot that padding is written to.
    """
    model = own_llama(max_position_embeddings=4096)
    how = {key: value for key, value in SETTINGS[name].items() if key != "strategy"}
    strategy = strategy_name(SETTINGS[name])
    config = GenerationConfig(max_steps=40, sample=False, generation_strategy=strategy, **how)
    prompts = [[5 + i % 40 for i in range(length)] for length in (6, 20, 500, 9, 300, 25)]
    expected = [generate(model, prompt, eos=[], max_steps=40).predicted_tokens for prompt in prompts]
    capture_decoding(model)
    scheduler = Scheduler(make_strategy(strategy), model, config, batch_size=4, token_budget=token_budget)
    scheduler.run_every_pass(600)
    num_captured = len(graphs.captured)
    found = {}
    for index, prompt in enumerate(prompts):  # each joins while the ones before decode
        scheduler.add_request(index, Request(prompt))
        scheduler.step()
        found |= scheduler.pop_finished()
    found |= drained(scheduler)
    assert [found[index].predicted_tokens for index in range(len(prompts))] == expected
    assert len(graphs.captured) == num_captured > 0
    assert {rows for _, rows, *_ in graphs.replayed} == {1, 2, 4}
    widths = {width for _, _, width, _ in graphs.replayed}
    assert widths == {1} if name == "autoregressive" else 1 in widths


@pytest.mark.usefixtures("graphs")
def test_a_lost_cache_is_not_written_to():
    """Guards against a chunk of a prompt in the cache of a generation that began later."""
    model, config = own_llama(), GenerationConfig(max_steps=20, sample=False)
    expected = generate(model, PROMPT, eos=[], max_steps=20).predicted_tokens
    capture_decoding(model)

    def begun(prompts):
        scheduler = Scheduler(make_strategy("autoregressive"), model, config, batch_size=2, token_budget=4)
        for key, prompt in enumerate(prompts):
            scheduler.add_request(key, Request(prompt))
            scheduler.step()
        return scheduler

    first, second = begun([PROMPT, PROMPT * 5]), begun([PROMPT] * 2)
    first.step()
    assert [str(error)[:32] for _, error in first.pop_finished()] == ["compile True: another generation"] * 2
    assert [result.predicted_tokens for result in drained(second).values()] == [expected] * 2


@pytest.mark.usefixtures("graphs")
def test_the_end_of_the_context(monkeypatch):
    """Guards against padding beyond the end of the cache."""
    monkeypatch.setattr(captured_runner, "_STEP", 8)
    model = own_llama(max_position_embeddings=64)
    for k in (8, 57):
        shared = {"exit_layer": 1, "num_speculations": k, "max_steps": 100, "eos": []}
        expected = generate(model, PROMPT, **shared)
        capture_decoding(model)
        result = generate(model, PROMPT, **shared)
        assert result.predicted_tokens == expected.predicted_tokens
        assert len(result.predicted_tokens) == 64 - len(PROMPT)


def test_rotary_embeddings_of_a_part_of_a_head(graphs):
    """Guards against a cache as narrow as the part that is rotated."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = family("glm4", rope_parameters=rope, num_hidden_layers=2).float()
    shared = {"max_steps": 8, "eos": [], "exit_layer": 1, "num_speculations": 3}
    expected = generate(model, PROMPT, **shared).predicted_tokens
    capture_decoding(model)
    assert make_runner(model).rotary.shape[2] == 4
    assert generate(model, PROMPT, **shared).predicted_tokens == expected
    assert graphs.captured


def hooked(model):
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: -output)


def scaled_in_place(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-3)


CHANGES = {
    "in place": scaled_in_place,
    "assigned": lambda model: model.load_state_dict(tiny_llama(agreement="never").state_dict(), assign=True),
    "pointed elsewhere": lambda model: setattr(
        model.model.layers[1].mlp.down_proj.weight, "data", torch.ones(32, 48)
    ),
    "fused again": fuse,
    "hooked": hooked,
    "dtype": lambda model: model.to(torch.float64),
    "turned": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "scaled": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.1),
}


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fused", [True, False])
def test_a_changed_model_is_captured_anew(change, fused):
    """Guards against replays with the weights, copies or hooks of before: on a GPU their memory may hold
    anything by then.
    """
    model = own_llama(fused, num_layers=4)
    strategies = [{}, DRAFTS, SETTINGS["short vocabulary"]]
    if fused and change not in ("hooked", "dtype"):
        strategies.append({**SETTINGS["copy"], "exit_layer": 4})

    def answers():
        results = [generate(model, PROMPT, max_steps=9, eos=[], **strategy) for strategy in strategies]
        return [(result.predicted_tokens, result.accepted_by_position) for result in results]

    capture_decoding(model)
    before = answers()
    CHANGES[change](model)
    captured = answers()
    decode_eagerly(model)
    assert captured == answers()
    assert change in ("fused again", "dtype") or captured != before


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("fails", ["before", "capture", "growth"])
def test_an_error_in_a_capture(fails, monkeypatch):
    """Guards against replays of earlier passes, whose workspace the failed graph has freed, a stream that
    stays the current one, and layers whose cache is shorter than that of others.
    """
    model = own_llama(max_position_embeddings=4096)
    config = GenerationConfig(max_steps=8, sample=False)
    prompts = [PROMPT, [8, 3], [7, 7, 9, 4]]
    expected = [generate(model, prompt, eos=[], max_steps=8).predicted_tokens for prompt in prompts]
    capture_decoding(model)
    scheduler = Scheduler(make_strategy("autoregressive"), model, config, batch_size=2)

    def answers(*numbers):
        for number in numbers:
            scheduler.add_request(number, Request(prompts[number]))
        found = drained(scheduler)
        return [found[number].predicted_tokens for number in numbers]

    assert answers(0) == expected[:1]  # captured for one row
    outer = torch.cuda.current_stream(model.device)
    scheduler.add_request(0, Request(PROMPT))
    with monkeypatch.context() as broken:
        if fails == "growth":
            empty = iter([torch.Tensor.new_zeros] * 3)  # of one layer, and the keys of the next
            broken.setattr("torch.Tensor.new_zeros", lambda *a, **k: next(empty, out_of_memory)(*a, **k))
            scheduler.add_request(1, Request([5] * 1100))
            scheduler.step()
        else:
            scheduler.add_request(1, Request(prompts[1]))
            run, calls = captured_runner._Passes._run, itertools.count()

            def failing(passes, *args):
                run(passes, *args)
                if next(calls) == (fails == "capture"):
                    out_of_memory()

            broken.setattr(captured_runner._Passes, "_run", failing)
            with pytest.raises(torch.OutOfMemoryError):
                scheduler.step()
    assert torch.cuda.current_stream(model.device) is outer
    found = drained(scheduler)
    assert isinstance(found[1], torch.OutOfMemoryError)
    assert found[0] is found[1] if fails != "growth" else found[0].predicted_tokens == expected[0]
    assert answers(0) == expected[:1]
    assert answers(1, 2) == expected[1:]


def captured(run, stream=None):
    """A graph, without the comparison of `cuda_graphs.stand_in`."""
    graph = torch.cuda.CUDAGraph()
    stream = stream or torch.cuda.Stream()
    with torch.cuda.graph(graph, object(), stream, capture_error_mode="thread_local"):
        run()
    return graph


@pytest.mark.usefixtures("graphs")
def test_the_stand_in_does_as_cuda_does():
    """Guards against a stand-in that lets everything pass, a capture that changes its inputs, results in the
    pool that outlive a replay, and graphs that outlive others of their stream.
    """
    x, kept, stream = torch.ones(3), [], torch.cuda.Stream()
    with torch.inference_mode():
        # A read on the host, host data, a shape by value.
        for fault in (lambda: x.sum().item(), lambda: torch.tensor([1.0]), lambda: x[x > 0]):
            with pytest.raises(CaptureError):
                captured(fault)
        graph = captured(lambda: kept.append(x.mul_(2) + 1))
        assert x.tolist() == [1, 1, 1]
        graph.replay()
        assert x.tolist() == [2, 2, 2]
        x.fill_(5)
        graph.replay()
        assert x.tolist() == [10, 10, 10]
        assert kept[0].isnan().all()
        for another in (lambda: x.sum().item(), x.sum):  # one fails, one is destroyed
            graph = captured(lambda: x.mul_(2), stream)
            with contextlib.suppress(CaptureError):
                captured(another, stream)
            with pytest.raises(AssertionError, match="workspace"):
                graph.replay()


@pytest.mark.usefixtures("graphs")
def test_padding_rows_write_to_no_free_slot():
    """Guards against a kept prefix that is lost when three rows are padded to four."""
    model = own_llama()
    capture_decoding(model)
    with torch.inference_mode():
        runner = make_runner(model)
        cache = runner.new_cache(1, 40, num_slots=4)
        cache.set_rows([0] * 3)
        kept = [part[3, :, :-1] for pair in cache.buffers.of_layers for part in pair]
        for part in kept:
            part.fill_(7)
        forward(runner, cache, torch.zeros(3, 1, dtype=torch.long))
    assert all(bool((part == 7).all()) for part in kept)


def test_nothing_is_captured_where_passes_are_eager(graphs):
    """Guards against a warm-up that captures for a model that does not want it."""
    config = GenerationConfig(max_steps=4, sample=False)
    Scheduler(make_strategy("autoregressive"), own_llama(), config, 2).run_every_pass(100)
    assert not graphs.captured


@pytest.mark.usefixtures("graphs")
def test_the_context_is_reserved_where_it_fits(monkeypatch):
    """Guards against a long request that ends all captured passes, and against a cache that leaves their
    graphs no room: keys and values of 8,192 positions take 5 MB, the graphs for them 10 MB.
    """
    config, capacities = GenerationConfig(max_steps=4, sample=False), []
    for free in (0, 10e6, 20e6):
        monkeypatch.setattr(captured_runner, "free_memory", lambda device, free=free: free)
        model = own_llama(max_position_embeddings=8192)
        capture_decoding(model)
        scheduler = Scheduler(make_strategy("autoregressive"), model, config, batch_size=2)
        scheduler.run_every_pass(100, longest=8192)
        keys, _ = scheduler._ensure_prepared().cache.buffers.of_layers[0]
        capacities.append(keys.shape[2])
    assert capacities == [1024, 4096, 9216]
