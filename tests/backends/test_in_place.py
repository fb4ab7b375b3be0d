"""Passes on a CPU are one operator: right, the same to the bit for every width, row, piece of a prompt and
number of threads, and always over the weights of now.
"""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import PROMPT, ROOT, WAYS, answer_of, assert_close, config_of, needs_operators, own_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llama_model_utils import windowed
from test_runners import another_norm, one_element, replaced_data, written
from torch import nn

from self_speculation import Request, make_strategy
from self_speculation.backends.buffers import SharedPrefix
from self_speculation.backends.copies import quantize
from self_speculation.backends.cpu_runner import InPlaceRunner
from self_speculation.backends.runner import ModelRunner
from self_speculation.backends.runners import bytes_made, fuse, make_runner
from self_speculation.llama_model_utils import forward, forward_early, forward_remainder
from self_speculation.models.families import LLAMA_LAYOUT
from self_speculation.weights import kernels

pytestmark = needs_operators
OPERATORS = kernels.cpu_operators()
ROUNDED = (
    {torch.bfloat16} if OPERATORS.variant == "AVX512_BF16" or "-DPAIRS" in kernels.VARIANTS["AVX2"] else set()
)
if OPERATORS.has_tiles:
    ROUNDED = {torch.bfloat16, torch.float16}

# Of keys and values, and how much their rounding changes logits at most.
ERRORS = {"float32": 0.0, "float16": 0.01, "bfloat16": 0.1}
DTYPES = [*ERRORS]

ODD = {"hidden_size": 36, "intermediate_size": 41, "num_attention_heads": 6, "num_key_value_heads": 3}
SHAPES = {
    "odd": {**ODD, "head_dim": 10},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "long": {"max_position_embeddings": 2048},
}


@torch.inference_mode()
def logits_of(runner, ids):
    """[1, 1, V] after ids [1, T]."""
    return forward(runner, runner.new_cache(1, 20), ids).logits


def spoilt(cache):
    """What was never written is NaN, or a huge number."""
    lengths = [*cache.lengths(), *[0] * cache.buffers.num_slots]
    for index, part in enumerate(cache.buffers.all()):
        for row in range(len(part)):
            part[row, :, lengths[row] :] = (1e30, float("nan"))[index % 2]


def pruned():
    """The operator takes layers of one shape at a time."""
    model = own_llama()
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = (nn.Linear(32, 20, bias=False) for _ in range(2))
    mlp.down_proj = nn.Linear(20, 32, bias=False)
    return model


def transposed():
    model = own_llama()
    for module in (model.model.layers[1].self_attn.q_proj, model.lm_head):
        module.weight.data = module.weight.data.t().contiguous().t()
    return model


MODELS = {name: partial(own_llama, **shape) for name, shape in SHAPES.items()}
MODELS |= {kind: partial(windowed, kind, **SHAPES["long"], hidden_size=48) for kind in LLAMA_LAYOUT[1:]}
MODELS |= {"pruned": pruned, "transposed": transposed}


def model_of(name, dtype=torch.float32):
    model = MODELS[name]()
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms are not zeros and ones
            weight.add_(0.02 * torch.randn_like(weight))
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, dtype):
    """Guards against an option of a layer that is passed over, sizes that are no multiple of a vector's,
    columns that are read beyond a row, or across memory, windows, chunks of keys that are merged wrongly,
    several of them without a key in the window, and output, or weights of more bits, that are rounded to
    bfloat16 as prompts are.
    """
    torch.manual_seed(0)
    model = model_of(name, dtype)
    length = 1100 if name in ("long", "mistral") else 45
    exact = copy.deepcopy(model).float()
    if hasattr(exact.model.embed_tokens, "embed_scale"):
        exact.model.embed_tokens.embed_scale.fill_(exact.model.embed_tokens.scalar_embed_scale)
    assert fuse(model) == len(model.model.layers)
    ids = torch.randint(3, 50, (1, length))
    with torch.inference_mode():
        runner = InPlaceRunner(model)
        expected = exact(ids).logits
        for is_prompt in (False, True):
            cache = runner.new_cache(1, length, dtype="float32")
            found = []
            start = 0
            cache.is_prompt = is_prompt
            for width in (1, 3, 20, 21, *[100] * 11):
                part = ids[:, start : start + width]
                if part.numel():
                    found.append(forward(runner, cache, part, part.shape[1]).logits)
                    spoilt(cache)
                start += width
            found = torch.cat(found, 1)
            if is_prompt and dtype in ROUNDED:
                assert 1e-4 < (found - expected).norm() / expected.norm() < 0.05
            else:
                assert_close(found, expected, roundings=400)


@given(
    name=st.sampled_from(["odd", "biases", "pruned", "transposed", "qwen3", "gemma3_text"]),
    form=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, 8, 4, "mixed"]),
    rows=st.lists(
        st.tuples(st.integers(1, 150) | st.just(600), st.integers(1, 33) | st.sampled_from([1, 1, 2, 150])),
        min_size=1,
        max_size=9,
    ),
    split=st.integers(1, 100),
    threads=st.integers(1, 3),
    is_prompt=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=16)
def test_bits_do_not_depend_on_the_pass(name, form, rows, split, threads, is_prompt, dtype):
    """Guards against sums in another order, or another format of inputs, for another width, row, piece of a
    prompt or thread: ties would decide. Guards against keys and states of a row that reach another one beside
    rows of other widths; for keys and values in each dtype.

    rows: the positions before the pass, and the new tokens, of each.
    """
    torch.manual_seed(0)
    model = model_of(name, form if isinstance(form, torch.dtype) else torch.float32)
    if not isinstance(form, torch.dtype):
        values = [layer.self_attn.v_proj for layer in model.model.layers]
        quantize(model, 8 if form == "mixed" else form)
        for layer, value in zip(model.model.layers, values, strict=True):
            if form == "mixed":  # as in files of llama.cpp
                layer.self_attn.v_proj = value
    fuse(model)
    runner = InPlaceRunner(model)
    size = model.config.hidden_size
    num_layers = len(runner.layers)
    pasts = [torch.randn(length, size) for length, _ in rows]
    widths = [width for _, width in rows]
    hidden = torch.randn(sum(widths), size)

    def cache_of(pasts):
        cache = runner.new_cache(1, 750, len(pasts), dtype)
        cache.set_rows([])
        for row, past in enumerate(pasts):
            runner.run_layers(cache.prompt_view(row), past.clone(), [len(past)], 0, num_layers)
            cache.set_rows([*cache.lengths(), len(past)])
        spoilt(cache)
        cache.is_prompt = is_prompt
        return cache

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            together = runner.run_layers(cache_of(pasts), hidden.clone(), widths, 0, num_layers)
            logits = runner.logits(together)
            torch.set_num_threads(1)
            each = zip(pasts, *(whole.split(widths) for whole in (hidden, together, logits)), strict=True)
            for past, states, expected, expected_logits in each:
                cache = cache_of([past])
                parts = [
                    runner.run_layers(cache, part.clone(), [len(part)], 0, num_layers)
                    for part in states.split(split)
                ]
                assert torch.equal(torch.cat(parts), expected)
                assert torch.equal(runner.logits(parts[-1][-1:]), expected_logits[-1:])
    finally:
        torch.set_num_threads(before)


@given(
    name=st.sampled_from(["odd", "long", "mistral", "gemma3_text"]),
    form=st.sampled_from([torch.float32, torch.bfloat16]),
    dtype=st.sampled_from(DTYPES),
    rows=st.lists(
        st.tuples(
            st.sampled_from([0, 64, 512, 576, 768, 960, 1024]),
            st.integers(0, 600),
            st.sampled_from([1, 1, 1, 2, 30]),
        ),
        min_size=2,
        max_size=6,
    ),
    threads=st.integers(1, 3),
    is_prompt=st.booleans(),
)
@settings(max_examples=12)
def test_bits_of_rows_that_share_a_prefix(name, form, dtype, rows, threads, is_prompt):
    """Guards against keys of a row that are read for another one, sums of spans in another order, and a
    window that begins in what rows share.

    rows: the positions of the shared prefix, those after it, and the new tokens, of each.
    """
    torch.manual_seed(0)
    model = model_of(name, form)
    fuse(model)
    runner = InPlaceRunner(model)
    size = model.config.hidden_size
    num_layers = len(runner.layers)
    shared = torch.randn(1024, size)
    pasts = [torch.randn(max(1, tail), size) for _, tail, _ in rows]
    hidden = [torch.randn(width, size) for *_, width in rows]
    widths = [*map(len, hidden)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            cache = runner.new_cache(1, 1700, len(rows), dtype)
            cache.set_rows([])
            place = cache.buffers.num_slots
            runner.run_layers(cache.prompt_view(place), shared.clone(), [1024], 0, num_layers)
            for row, ((length, *_), past) in enumerate(zip(rows, pasts, strict=True)):
                cache.set_prefix(row, SharedPrefix(place, length))
                runner.run_layers(cache.prompt_view(row, [length]), past.clone(), [len(past)], 0, num_layers)
                cache.set_rows([*cache.lengths(), length + len(past)])
            cache.is_prompt = is_prompt
            together = runner.run_layers(cache, torch.cat(hidden), widths, 0, num_layers)
            each = zip(rows, pasts, hidden, together.split(widths), strict=True)
            for (length, *_), past, states, expected in each:
                alone = runner.new_cache(1, 1700, dtype=dtype)
                whole = torch.cat((shared[:length], past))
                runner.run_layers(alone.prompt_view(0), whole, [len(whole)], 0, num_layers)
                alone.set_rows([len(whole)])
                alone.is_prompt = is_prompt
                found = runner.run_layers(alone, states.clone(), [len(states)], 0, num_layers)
                assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["odd", "long", "mistral", "gemma3_text"])
def test_keys_and_values_are_rounded_once(name):
    """Guards against numbers that are rounded twice, or to another dtype, and against a chunk of keys that is
    widened in the place of another one. Rounded keys and values are those that torch rounds.
    """
    torch.manual_seed(0)
    model = model_of(name)
    plain = ModelRunner(model)
    fuse(model)
    runner = InPlaceRunner(model)
    ids = torch.randint(3, 50, (1, 700))
    with torch.inference_mode():
        found = {}
        for dtype, bound in ERRORS.items():
            cache, expected = (each.new_cache(1, 700, dtype=dtype) for each in (runner, plain))
            found[dtype] = forward(runner, cache, ids, 700).logits
            by_torch = forward(plain, expected, ids, 700).logits
            assert {part.dtype for part in cache.buffers.all()} == {getattr(torch, dtype)}
            norm = found["float32"].norm()
            assert (found[dtype] - by_torch).norm() / norm <= max(1e-5, bound / 20)
            error = (found[dtype] - found["float32"]).norm() / norm
            assert bound / 1000 <= error <= bound
            for part, other in zip(cache.buffers.by_layer[0], expected.buffers.by_layer[0], strict=True):
                equal = part[:, :, :700] == other[:, :, :700]
                assert not bound or equal.float().mean() > 0.99  # sums in float32 have another order


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_all_ways_are_equal(dtype):
    """Guards against a draft or verification that rounds otherwise, and keys of a kept prompt that differ in
    a bit: not only greedy ids agree, but logits.
    """
    model = own_llama(fused=True).bfloat16()
    fuse(model)

    def seen(**settings):
        found = {}
        strategy = make_strategy(config_of(**settings).generation_strategy)

        def keep(ids, scores):
            found.setdefault(tuple(ids[0].tolist()), []).append(scores[0].clone())
            return scores

        for prompt in (PROMPT, PROMPT * 2):  # which goes on with what the first one left
            request = Request(prompt, [keep], eos_token_ids=[])
            shared = {"max_steps": 20, "reuse_cache": True, "cache_dtype": dtype}
            answer_of(strategy, model, request, **shared, **settings)
        return found

    plain = seen()
    for way in (WAYS["layers"], WAYS["copy"], {**WAYS["layers"], "num_speculations": 9}):
        found = seen(**way)
        assert len(found) > len(plain) > 20  # drafted texts, and those of the answers
        for text, (scores,) in plain.items():
            assert any(torch.equal(scores, other) for other in found[text])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("variant", "flags"), [("AVX2", "(*kernels._AVX2, '-DPAIRS')"), ("AMX", "('-DTILES',)")]
)
def test_prompts_in_bfloat16(variant, flags):
    """Guards against prompts in bfloat16, which few processors multiply, that depend on how they are read."""
    code = (
        "import sys, pytest; from self_speculation.weights import kernels;"
        f"kernels.VARIANTS[{variant!r}] = {flags}; kernels._best_variant = lambda: {variant!r};"
        f"sys.exit(pytest.main(['-n0', '-p', 'no:cacheprovider', {__file__!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("is_prompt", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(dtype, is_prompt):
    """Guards against a broken row that spoils neighbours, and against NaN that vanishes in a maximum."""
    model = own_llama().to(dtype)
    fuse(model)
    runner = InPlaceRunner(model)
    hidden = torch.randn(6, 32)
    widths = [2, 3, 1]
    with torch.inference_mode():
        cache = runner.new_cache(1, 8, num_slots=3)
        cache.set_rows([0] * 3)
        cache.is_prompt = is_prompt
        expected = runner.run_layers(cache, hidden.clone(), widths, 0, 4)
        for value in (float("nan"), float("inf")):
            broken = hidden.clone()
            broken[3, 5] = value  # of the second row
            cache.set_rows([0] * 3)
            found = runner.run_layers(cache, broken, widths, 0, 4)
            assert torch.equal(found[[0, 1, 2, 5]], expected[[0, 1, 2, 5]])
            assert found[[3, 4]].isnan().all()


def in_bfloat16(model):
    model.model.layers[2].self_attn.k_proj.weight.data = torch.randn(16, 32).bfloat16()


@pytest.mark.parametrize("change", [replaced_data, written, one_element, another_norm, in_bfloat16])
def test_a_weight_that_changes_between_two_tokens_decodes(change):
    """Guards against anything that is made of weights, without a call, also if one has another dtype than
    those beside it: what decodes is the weights of now.
    """
    model = own_llama(fused=True)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        runner = InPlaceRunner(model)
        cache = runner.new_cache(1, 20)
        forward(runner, cache, ids)
        torch.manual_seed(0)
        change(model)
        kept = copy.deepcopy(cache)
        found = forward(runner, cache, ids[:, :1]).logits
        assert_close(found, forward(ModelRunner(model.float()), kept, ids[:, :1]).logits, roundings=400)
    assert bytes_made(model) == 0


def test_a_weight_of_another_shape_is_refused_until_the_old_one_is_back():
    """Guards against memory that is read as what it was, and against layers that an error has halved."""
    model = own_llama(fused=True)
    ids = torch.tensor([PROMPT])
    up = model.model.layers[2].mlp.up_proj.weight
    wide = torch.randn(48, 64)
    runner = InPlaceRunner(model)
    kept = up.data
    expected = logits_of(runner, ids)
    for good, bad in ((kept, kept[:24]), (kept, torch.randn(24, 32)), (wide[:, :32], wide[:, ::2])):
        up.data = good
        logits_of(runner, ids)
        up.data = bad  # the last one is at the same address
        with pytest.raises((RuntimeError, ValueError)):
            logits_of(runner, ids)
    up.data = kept
    assert torch.equal(logits_of(runner, ids), expected)


@needs_operators
def test_a_cache_in_another_dtype_is_refused():
    """Guards against an operator that writes beyond buffers, and reads states in 16 bits as float32."""
    model = own_llama().double()
    ids = torch.tensor([PROMPT])
    early = make_runner(model).new_cache(8, 8)
    fuse(model.to(torch.bfloat16))
    runner = make_runner(model)
    with pytest.raises(ValueError, match=r"cache: has keys .* in torch.float64, the runner .*float32"):
        forward(runner, early, ids)
    cache = runner.new_cache(8, 8)
    exit_hidden = forward_early(runner, cache, ids, 2).hidden
    assert forward_remainder(runner, cache, exit_hidden.bfloat16(), 2).logits.isfinite().all()


def test_layers_with_buffers_of_several_sizes_decode():
    """Guards against passes that are refused after memory ran out while buffers grew."""
    model = own_llama(fused=True)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        runner = InPlaceRunner(model)
        found = []
        for grown in (0, 2):
            cache = runner.new_cache(1, 20)
            forward(runner, cache, ids)
            cache.buffers.capacity += 8
            for layer in range(grown):
                cache.buffers.with_room(layer, cache.buffers.capacity)
            found.append(forward(runner, cache, ids).logits)
    assert torch.equal(*found)
