"""Captured passes: the ids of eager ones, one capture per shape, and no captures that CUDA refuses."""

import gc
import itertools
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext

import pytest
import torch
from conftest import (
    ADAPTIVE,
    LAYERS,
    PROMPT,
    WAYS,
    assert_close,
    card_llama,
    config_of,
    drained,
    ids_of,
    in_batch,
    own_llama,
    planned,
    scheduler_of,
    tiny_llama,
    ways,
)
from cuda_graphs import decode_eagerly
from helpers import watch
from test_llama_model_utils import family, windowed

from runs.startup import captured
from self_speculation import Request
from self_speculation.backends import buffers, captures, runners
from self_speculation.backends.card_runner import FusedRunner
from self_speculation.backends.layers import Head
from self_speculation.backends.runners import capture_decoding, fuse, make_runner
from self_speculation.drafts import registry
from self_speculation.drafts.draft import DraftCost, LayerDrafts
from self_speculation.drafts.policy import AdaptivePolicy, Plan
from self_speculation.engine import replayed_rounds
from self_speculation.engine.scheduler import Scheduler
from self_speculation.models.model_cache import kept, peek


def test_one_graph_serves_all_lengths(graphs):
    """Guards against a capture for each length, and against graphs that end with a request that is longer
    than the ones before, but not than the cache.
    """
    model = card_llama(max_position_embeddings=4096)
    num_captured = []
    prompts = [[5 + i % 40 for i in range(length)] for length in (10, 300, 1100, 2100, 2300, 700)]
    expected = [ids_of(model, prompt, max_steps=5) for prompt in prompts]
    capture_decoding(model)
    for prompt, ids in zip(prompts, expected, strict=True):
        assert ids_of(model, prompt, max_steps=5, exit_layer=1, num_speculations=3) == ids
        num_captured.append(len(graphs.captured))
    capacity = make_runner(model).new_cache(1, 1).buffers.capacity
    # Only a larger cache ends them, for 1,100 and 2,100 tokens.
    assert num_captured[1] < num_captured[2] < num_captured[3] == num_captured[5]
    assert capacity == 3072
    assert max(Counter(graphs.captured[: num_captured[1]]).values()) == 1


@pytest.mark.parametrize("way", ways(*WAYS, "early exit"))
def test_ids_are_those_of_eager_passes(way, graphs):
    """Guards against positions, lengths, widths or copies that are constants of a graph, graphs of other
    layers than those that draft or verify, results that are read after the next replay, and padding that is
    attended to. Guards against a request that waits for a capture: for more rows or a wider draft.
    """
    model = card_llama(4, max_position_embeddings=4096)
    drafts = WAYS.get(way, {"exit_layer": 2})
    lengths = (6, 20, 500, 9, 25)
    config = {"max_steps": 20, "temperature": 0.7, "top_p": 0.9, **drafts}
    configs = [config_of(**config, sample=is_sampled) for is_sampled in (False, True)]
    requests = {
        index: Request([5 + i % 40 for i in range(length)], seed=index, config=configs[index % 2])
        for index, length in enumerate(lengths)
    }
    expected = in_batch(model, requests.values(), 3, **config)
    capture_decoding(model)
    scheduler = scheduler_of(model, 3, 8 if way == "plain" else None, **config)
    scheduler.capture_passes(600)
    num_captured = len(graphs.captured)
    found = {}
    for index, request in requests.items():  # each joins while the ones before decode
        scheduler.add_request(index, request)
        scheduler.step()
        found |= scheduler.pop_finished()
    found |= drained(scheduler)
    ids, ids_of_eager = ([results[i].predicted_tokens for i in requests] for results in (found, expected))
    assert ids == ids_of_eager
    assert len(graphs.captured) == num_captured > 0
    assert {1, 2} <= {rows for _, _, rows, *_ in graphs.replayed}
    widths = {key[6] for key in graphs.replayed if key[0] == "verify"}
    assert 1 in widths
    assert "num_speculations" not in drafts or max(widths) > 1


def ids_of_request(model, request):
    """By eager passes and without drafts."""
    was_captured = runners.is_captured(model)
    decode_eagerly(model)
    config = {"max_steps": request.config.max_steps, "eos": request.eos_token_ids or []}
    ids = ids_of(model, request.prompt, **config)
    if was_captured:
        capture_decoding(model)
    return ids


@pytest.mark.parametrize("way", ways("layers", "n-grams", "copy", "adaptive"))
def test_greedy_drafts_are_whole_steps(way, graphs):
    """Guards against positions, limits or ids of another row or step where the card moves on by itself:
    prompts of many lengths, rows that join and end, drafts that end at a limit, a stop, a cache that grows,
    and a prefix that is kept. Guards against a capture that a request waits for.
    """
    model = card_llama(4, max_position_embeddings=4096)
    drafts = WAYS[way]
    config = {"sample": False, "reuse_cache": True, **drafts}
    lengths = (6, 20, 9, 25, 1100, 7)
    requests = {}
    for index, length in enumerate(lengths):
        ids = [5 + (3 * index + i) % 40 for i in range(length)]
        row_config = config_of(**config, max_steps=9 + 4 * index)
        requests[index] = Request(ids, eos_token_ids=[19] if index == 3 else None, config=row_config)
    expected = {index: ids_of_request(model, request) for index, request in requests.items()}
    capture_decoding(model)
    scheduler = scheduler_of(model, 3, max_steps=30, **config)
    scheduler.capture_passes(600)
    num_graphs = graphs.num_graphs
    found = {}
    for index in (0, 1, 2, 3):
        scheduler.add_request(index, requests[index])
        scheduler.step()
        found |= scheduler.pop_finished()
    found |= drained(scheduler)
    assert graphs.num_graphs == num_graphs
    for index in (4, 5):  # the first one does not fit
        scheduler.add_request(index, requests[index])
        found |= drained(scheduler)
    assert graphs.num_graphs > num_graphs
    assert {index: found[index].predicted_tokens for index in requests} == expected
    again = Request([*requests[5].prompt, *expected[5], 8], config=requests[5].config)
    scheduler.add_request(6, again)
    (result,) = drained(scheduler).values()
    assert result.num_cached_tokens > 0
    assert result.predicted_tokens == ids_of_request(model, again)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("way", ["plain", "n-grams", "adaptive"])
def test_rounds_before_the_first_request_leave_nothing(way):
    """Guards against a prefix whose keys the rounds have overwritten, against draws of torch's generator, and
    against rows or keys that the first request meets.
    """
    model = card_llama(4)

    def scheduler():
        shared = {"sample": True, "temperature": 0.7, "reuse_cache": True}
        return scheduler_of(model, 2, **{**shared, **WAYS[way]})

    def answer(scheduler):
        scheduler.add_request(0, Request(PROMPT * 2, seed=0))
        return drained(scheduler)[0]

    expected = answer(scheduler()).predicted_tokens
    capture_decoding(model)
    answer(scheduler())  # leaves a prefix
    state = torch.random.get_rng_state()
    rehearsed = scheduler()
    rehearsed.capture_passes(100)
    assert torch.equal(torch.random.get_rng_state(), state)
    buffers = rehearsed._ensure_inputs().cache.buffers
    assert not any(part.count_nonzero() for part in buffers.all())
    result = answer(rehearsed)
    assert result.predicted_tokens == expected
    assert result.num_cached_tokens == 0


@pytest.mark.usefixtures("graphs")
def test_a_lost_cache_is_not_written_to():
    """Guards against a chunk of a prompt in the cache of a generation that began later."""
    model = card_llama()
    expected = ids_of(model)
    capture_decoding(model)

    def begun(prompts):
        scheduler = scheduler_of(model, 2, token_budget=4, max_steps=20)
        for key, prompt in enumerate(prompts):
            scheduler.add_request(key, Request(prompt))
            scheduler.step()
        return scheduler

    first, second = begun([PROMPT, PROMPT * 5]), begun([PROMPT] * 2)
    first.step()
    lost = "compile True: another generation has this one's cache; let one end before the next begins"
    assert [str(error) for _, error in first.pop_finished()] == [lost] * 2
    assert [result.predicted_tokens for result in drained(second).values()] == [expected] * 2


@pytest.mark.usefixtures("graphs")
def test_no_request_waits_for_a_prompt_whose_cache_is_lost():
    """Guards against requests that wait for ever for a prompt with the same beginning, which is not read on
    since another generation began.
    """
    model = card_llama()
    capture_decoding(model)
    scheduler = scheduler_of(model, 2, token_budget=16)
    for key in range(2):
        scheduler.add_request(key, Request([*range(3, 47)] * 3 + [key]))
    scheduler.step()
    ids_of(model)
    for _ in range(3):
        scheduler.step()
    lost = "compile True: another generation has this one's cache; let one end before the next begins"
    assert {key: str(error) for key, error in scheduler.pop_finished()} == {0: lost, 1: lost}


@pytest.mark.usefixtures("graphs")
def test_a_capture_of_passes_that_is_lost_clears_no_slots(monkeypatch):
    """Guards against a prompt of another generation that becomes zeros, since that generation began while
    passes were captured.
    """
    model = card_llama()
    expected = ids_of(model)
    capture_decoding(model)
    second = []

    def begin(*_):
        if not second:
            second.append(scheduler_of(model, 1, max_steps=20))
            second[0].add_request(0, Request(PROMPT, eos_token_ids=[]))
            second[0].step()

    first = scheduler_of(model, 1)
    watch(monkeypatch, Scheduler, "_rehearse", begin)
    with pytest.raises(RuntimeError, match="another generation"):
        first.capture_passes(100)
    assert [result.predicted_tokens for result in drained(second[0]).values()] == [expected]


@pytest.mark.usefixtures("graphs")
def test_no_generation_takes_buffers_that_grow(monkeypatch):
    """Guards against keys and values of another generation that are lost, since it writes them to buffers
    that have been copied to larger ones.
    """
    model = card_llama(max_position_embeddings=4096)
    capture_decoding(model)
    cache = make_runner(model).new_cache(1, 1)
    lock = cache.buffers.lock

    def takes():
        is_free = lock.acquire(blocking=False)
        if is_free:
            lock.release()
        return is_free

    taken = []
    with ThreadPoolExecutor(1) as thread:
        try_out = lambda *_: taken.append(thread.submit(takes).result())  # noqa: E731
        watch(monkeypatch, buffers.Buffers, "with_room", try_out)
        cache.reserve(1100, 1100)
    assert taken
    assert not any(taken)


@pytest.mark.usefixtures("graphs")
def test_the_end_of_the_context(monkeypatch):
    """Guards against padding that is written beyond the end of the cache."""
    monkeypatch.setattr(captures, "_STEP", 8)
    model = card_llama(max_position_embeddings=64)
    for prompt, k in ((PROMPT, 8), (PROMPT * 5, 57)):  # the latter pads 34 tokens to 64
        expected = ids_of(model, prompt, max_steps=100)
        assert len(expected) == 64 - len(prompt)
        capture_decoding(model)
        assert ids_of(model, prompt, max_steps=100, exit_layer=1, num_speculations=k) == expected
        decode_eagerly(model)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("fails", ["before", "capture", "growth", "tables"])
def test_an_error_in_a_capture(fails, monkeypatch):
    """Guards against replays of earlier passes, whose workspace the failed graph has freed, a stream that
    stays the current one, and layers whose cache is shorter than the cache of other layers.
    """
    model = card_llama(max_position_embeddings=4096)
    prompts = [PROMPT, [8, 3], [7, 7, 9, 4], [5] * 1100]
    expected = [ids_of(model, prompt, max_steps=8) for prompt in prompts]
    capture_decoding(model)
    scheduler = scheduler_of(model, 2, max_steps=8)

    def answers(*numbers):
        for number in numbers:
            scheduler.add_request(number, Request(prompts[number]))
        return [
            getattr(result, "predicted_tokens", result) for _, result in sorted(drained(scheduler).items())
        ]

    def fail_after(number, owner, name):
        run = getattr(owner, name)
        calls = itertools.count()

        def failing(*args, **more):
            if next(calls) == number:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(*args, **more)

        broken.setattr(owner, name, failing)

    assert answers(0) == expected[:1]  # captured for one row
    outer = torch.cuda.current_stream(model.device)
    scheduler.add_request(0, Request(PROMPT))
    with monkeypatch.context() as broken:
        if fails in ("growth", "tables"):
            held = scheduler._ensure_inputs().cache.buffers
            # Of one layer, and the keys of the next.
            fail_after(*((3, buffers, "zeros") if fails == "growth" else (0, held.tables, "reserve")))
            scheduler.add_request(1, Request(prompts[3]))
            scheduler.step()
            assert held.capacity == min(part.shape[2] for part in held.all())
        else:
            fail_after(fails == "capture", captures.CapturedPasses, "_run")
            scheduler.add_request(1, Request(prompts[1]))
            with pytest.raises(torch.OutOfMemoryError):
                scheduler.step()
    assert torch.cuda.current_stream(model.device) is outer
    first, second = answers()
    assert isinstance(second, torch.OutOfMemoryError)
    assert first is second if fails in ("before", "capture") else first == expected[0]
    assert answers(0) == expected[:1]
    assert answers(1, 2) == expected[1:3]
    assert answers(3) == expected[3:]


@pytest.mark.usefixtures("graphs")
def test_two_models_are_captured_side_by_side(monkeypatch):
    """Guards against a capture that ends another thread's: torch captures one graph at a time; and against
    graphs of a model whose workspace goes with those of another one: torch hands out the same streams in
    turn, and a cache that grows needs a new one.
    """
    models = [card_llama(n, max_position_embeddings=8192) for n in (2, 3)]
    expected = [*map(ids_of, models)]
    run = captures.CapturedPasses._run

    def slowly(*args):
        time.sleep(0.05)  # so that the other thread could begin
        return run(*args)

    for model in models:
        capture_decoding(model)
    with monkeypatch.context() as slow, ThreadPoolExecutor(2) as threads:
        slow.setattr(captures.CapturedPasses, "_run", slowly)
        assert [*threads.map(ids_of, models)] == expected
    for length in (1100, 2100, 3100):
        ids_of(models[1], [5 + i % 40 for i in range(length)], max_steps=3)
        assert ids_of(models[0]) == expected[0]


def test_graphs_end_with_the_thread_that_has_captured_them(graphs):
    """Guards against graphs whose workspace was that of a thread which is gone, and against passes that each
    thread captures anew while the first one is there.
    """
    model = card_llama()
    expected = ids_of(model)
    capture_decoding(model)
    for first, second in ((ids_of, None), (ids_of, ids_of)):
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(first, model).result() == expected
            num_captured = len(graphs.captured)
            if second is not None:
                assert second(model) == expected
                assert len(graphs.captured) == num_captured
    assert ids_of(model) == expected
    assert len(graphs.captured) == 3 * len({*graphs.captured})


def test_times_of_rounds_that_capture_are_not_learnt(graphs, monkeypatch):
    """Guards against drafts that seem ten times as dear since their first pass was captured."""
    model = card_llama(4)
    begun = []
    capture_decoding(model)
    plan = planned(lambda sources, matches, limits: Plan([sources[0]], [min(2, *limits)], trial=0))
    monkeypatch.setattr(AdaptivePolicy, "plan", plan)
    watch(monkeypatch, AdaptivePolicy, "plan", lambda *_: begun.append(len(graphs.captured)))
    learnt = watch(
        monkeypatch, AdaptivePolicy, "learn", lambda *given: begun.append(len(graphs.captured) - begun.pop())
    )
    ids_of(model, **ADAPTIVE)
    assert [args[3] is None for args, _ in learnt] == [number > 0 for number in begun]
    assert 0 in begun


@pytest.mark.usefixtures("graphs")
def test_the_context_is_reserved_where_it_fits(monkeypatch):
    """Guards against a long request that ends all captured passes, also without memory for more, and against
    a cache that leaves their graphs or sampling no room: keys and values of 8,192 positions take 17 MB in two
    slots.
    """
    capacities = []
    for free in (3e6, 15e6, 25e6):
        monkeypatch.setattr("self_speculation.backends.buffers.free_memory", lambda device, free=free: free)
        model = card_llama(max_position_embeddings=8192)
        capture_decoding(model)
        scheduler = scheduler_of(model, 2, max_steps=4)
        scheduler.capture_passes(100, longest=8192)
        cache = scheduler._ensure_inputs().cache
        monkeypatch.setattr("self_speculation.backends.buffers.free_memory", lambda _: 0)
        cache.reserve(10, 9000)
        assert peek(model, captures.CapturedPasses).replays
        keys, _ = cache.buffers.by_layer[0]
        assert keys.shape[2] == cache.buffers.capacity
        capacities.append(keys.shape[2])
    assert capacities == [1984, 6672, 8192]


@pytest.mark.usefixtures("graphs")
def test_scripts_capture_where_it_is_possible():
    """Guards against a card that decodes at the speed of the host since nobody knew of a flag, and against an
    error where a model cannot be captured.
    """
    model = card_llama()
    assert captured(model).startswith("decoding passes are captured as CUDA graphs: each takes")
    assert runners.is_captured(model)
    for other, why in (
        (family("glm4"), "model type 'glm4' is not one of llama, mistral"),
        (own_llama(2), "its layers are not fused"),
    ):
        assert captured(other).startswith(f"decoding passes are not captured as CUDA graphs, since {why}")
        assert not runners.is_captured(other)


def test_models_that_cannot_be_captured_are_refused():
    """Guards against an error of CUDA in the middle of a capture."""
    for kind, method, why in (
        ("llama", "gguf", None),  # weights in 16 bits
        ("llama", "gptq", r"not with quantised weights \(gptq\)"),
        ("glm4", "gguf", "model type 'glm4' is not one of llama, mistral"),
    ):
        config = family(kind).config
        config.quantization_config = {"quant_method": method}
        with pytest.raises(ValueError, match=f"compile True: {why}") if why else nullcontext():
            runners.check_can_be_captured(config)


@pytest.mark.parametrize(
    ("fused", "why"), [(False, "its layers are not fused"), (True, "they are for NVIDIA's cards")]
)
def test_passes_that_cannot_be_captured_are_eager(fused, why):
    """Guards against a flag that does nothing in silence, and against decoding that fails."""
    model = own_llama(2, fused=fused)
    expected = ids_of(model)
    with pytest.warns(UserWarning, match=f"compile True: passes are not captured, since {why}"):
        capture_decoding(model)
    assert ids_of(model) == expected


@pytest.mark.usefixtures("graphs")
def test_prompts_see_their_window():
    """Guards against flash attention, which sees all positions, in layers with windows."""
    model = windowed("qwen2").float()
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        fuse(model)
        cache = FusedRunner(model).new_cache(12, 12)
        cache.is_prompt = True
        assert_close(FusedRunner(model).run(cache, ids, num_logits=12).logits, expected)


def begun(model, prompt, **config):
    """A scheduler that has read a prompt and not decoded."""
    scheduler = scheduler_of(model, 1, **config)
    scheduler.add_request(0, Request(prompt, eos_token_ids=[]))
    scheduler._decode = lambda: None
    scheduler.step()
    del scheduler._decode
    return scheduler


@pytest.mark.usefixtures("graphs")
def test_a_cache_that_grows_while_another_generation_captures(monkeypatch):
    """Guards against a graph over old buffers that is kept for the new ones."""
    model = card_llama(max_position_embeddings=4096)
    prompt = [31, 8, 4, 17, 3, 22, 9, 6]
    expected = ids_of(model, prompt, max_steps=20, eos=())
    capture_decoding(model)
    record = captures.GraphRecorder.__call__
    second = []
    with ThreadPoolExecutor(1) as other:

        def record_beside_another(recorder, run):
            replay = record(recorder, run)
            if not second:
                second.append(other.submit(begun, model, prompt, max_steps=2000))
                wait(second, timeout=1.0)
            return replay

        monkeypatch.setattr(captures.GraphRecorder, "__call__", record_beside_another)
        first = scheduler_of(model, 1, max_steps=20)
        first.add_request(0, Request(PROMPT))
        first.step()
        scheduler = second[0].result()
    for _ in range(21):
        scheduler.step()
    assert scheduler.batch.sequences[0].output_ids[:20] == expected


@pytest.mark.usefixtures("graphs")
def test_a_generation_that_begins_during_a_round_of_another_one(monkeypatch):
    """Guards against keys that a generation writes after it has lost the buffers."""
    model = card_llama()
    prompt = [*range(4, 28)]
    expected = ids_of(model, prompt)
    capture_decoding(model)
    first = scheduler_of(model, 1, max_steps=20)
    first.add_request(0, Request(PROMPT))
    first.step()
    begin = replayed_rounds._begin
    with ThreadPoolExecutor(1) as other:
        second = []

        def begin_beside_another(*args):
            made = begin(*args)
            if not second:
                second.append(other.submit(begun, model, prompt, max_steps=20))
                wait(second, timeout=1.0)
            return made

        monkeypatch.setattr(replayed_rounds, "_begin", begin_beside_another)
        first.step()
        first.step()
        assert second, "the second round went on from the first one"
        found = drained(second[0].result())
    assert found[0].predicted_tokens[: len(expected)] == expected
    (error,) = drained(first).values()
    assert "another generation has this one's cache" in str(error)


@pytest.mark.usefixtures("graphs")
def test_a_new_cache_reads_no_positions_together():
    """Guards against the shared prefix of a generation that was left in the middle."""
    model = card_llama()
    capture_decoding(model)
    runner = make_runner(model)
    with torch.inference_mode():
        before = runner.new_cache(1, 100, 2)
        before.read_together(1, [64, 64])
        assert before.buffers.prefix_reads.tolist() == [1, 64, 64]
        cache = runner.new_cache(1, 100, 2)
        assert cache.buffers.prefix_reads.tolist() == [0, 0, 0]
        with pytest.raises(RuntimeError, match="another generation"):
            before.read_together(1, [64, 128])
        with pytest.raises(RuntimeError, match="another generation"):
            before.copy_positions(0, 1, 8)
    assert cache.buffers.prefix_reads.tolist() == [0, 0, 0]


@pytest.mark.usefixtures("graphs")
def test_a_waiting_request_of_a_lost_cache_says_so():
    """Guards against an error about an empty sequence."""
    model = card_llama()
    capture_decoding(model)
    first = scheduler_of(model, 1, max_steps=20)
    for key in range(2):
        first.add_request(key, Request(PROMPT))
    first.step()
    begun(model, PROMPT, max_steps=20)
    errors = drained(first)
    assert len({*map(str, errors.values())}) == 1


@pytest.mark.usefixtures("graphs")
def test_old_buffers_are_freed_before_new_ones_are_made(monkeypatch):
    """Guards against two caches on a card at once, of which kept prefixes hold one."""
    model = card_llama()
    capture_decoding(model)
    kept = {"max_steps": 5, "reuse_cache": True}
    old = []
    make = captures.CapturedPasses.__init__

    def seen(passes, *args):
        gc.collect()
        assert not any(passes() for passes in old)
        old.append(weakref.ref(passes))
        make(passes, *args)

    monkeypatch.setattr(captures.CapturedPasses, "__init__", seen)
    for batch_size, config in ((1, kept), (1, kept), (4, {"max_steps": 5})):
        scheduler = scheduler_of(model, batch_size, **config)
        scheduler.add_request(0, Request(PROMPT))
        drained(scheduler)
        del scheduler
        if len(old) == 1:
            with torch.no_grad():
                model.lm_head.weight.mul_(1.5)
    assert len(old) == 3


@pytest.mark.usefixtures("graphs")
def test_an_idle_server_keeps_the_prefixes_of_a_captured_model():
    """Guards against prefixes that are lost though no memory comes back."""
    model = card_llama()
    capture_decoding(model)
    scheduler = scheduler_of(model, 1, max_steps=5, reuse_cache=True)
    scheduler.add_request(0, Request(PROMPT))
    drained(scheduler)
    scheduler.shrink_cache(1)
    scheduler.add_request(1, Request([*PROMPT, 5]))
    (result,) = drained(scheduler).values()
    assert result.num_cached_tokens >= len(PROMPT) - 1


def test_a_captured_model_that_has_moved_to_a_cpu_decodes():
    """Guards against a stream of a card that is not the model's."""
    model = tiny_llama()
    expected = ids_of(model)
    kept(model)["is_captured"] = True
    assert ids_of(model) == expected


@pytest.mark.usefixtures("graphs")
def test_two_sources_with_other_layers_have_their_graphs(monkeypatch):
    """Guards against the graph of one source's head that drafts for another source."""
    model = card_llama(4)
    capture_decoding(model)
    num_graphs = []

    class OneToken(Head):
        def __init__(self, head, token):
            super().__init__(head.norm, head.linear)
            self._token = token

        def __call__(self, hidden):
            logits = torch.zeros(len(hidden), model.config.vocab_size)
            logits[:, self._token] = 1
            return logits

    for token in (7, 9):

        def source(context, token=token):
            runner = context.runner
            other = runner.with_layers(runner.layers, OneToken(runner.head, token))
            return [LayerDrafts(other, 1, "int4", DraftCost())]

        monkeypatch.setattr(registry, "draft_sources", source)
        ids_of(model, **LAYERS, max_steps=4, eos=())
        replays = peek(model, captures.CapturedPasses).replays
        num_graphs.append(sum(part == "draft" for part, *_ in replays))
    assert num_graphs == [1, 2]
