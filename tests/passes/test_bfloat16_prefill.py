"""Long prompts in bfloat16: all decoding over them is in float32, so no strategy changes an id."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from conftest import (
    ADAPTIVE,
    COPY,
    EOS,
    LAYERS,
    answer_of,
    generate,
    ids_of,
    in_batch,
    needs_operators,
    own_llama,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from self_speculation import LoadingOptions, Request, load_model_and_tokenizer, make_strategy
from self_speculation.config import default_model
from self_speculation.loading.loading import check_prefill_dtype, load_config, with_fast_prompts
from self_speculation.loading.sources import LoadingError
from self_speculation.passes.attention import attend_to_past
from self_speculation.passes.fused_layers import fuse, parts_of
from self_speculation.passes.model_runner import ModelRunner, forward_early
from self_speculation.weights.kernels import cpu_operators
from self_speculation.weights.linear import MIN_BFLOAT16_PREFILL

PROMPTS = [[3 + (i * i + i // n) % 40 for i in range(length)] for n, length in ((3, 170), (5, 331), (7, 20))]
needs_kernels = pytest.mark.skipif(
    cpu_operators().variant is None or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="no operators, or oneDNN without bfloat16",
)


@functools.cache
def model_of(dtype=torch.float16, **config):
    model = own_llama(max_position_embeddings=512, **config).half().to(dtype)
    fuse(model, bfloat16_prefill=True)
    return model


def states(model, ids, *borders, for_prompts=True):
    """[T, H] after the last layer, of a prompt that is read in chunks."""
    runner = ModelRunner(model)
    cache = runner.new_cache(len(ids), len(ids))
    cache = cache.prompt_view(0) if for_prompts else cache
    chunks = torch.tensor([ids]).tensor_split(borders, 1)
    with torch.inference_mode():
        return torch.cat([forward_early(runner, cache, chunk, 4, num_logits=0).hidden[0] for chunk in chunks])


def error(found, expected):
    """Relative, of all elements together."""
    return float((found - expected).norm() / expected.norm())


@needs_kernels
@pytest.mark.parametrize("drafts", [LAYERS, COPY, ADAPTIVE])
def test_no_strategy_and_no_batch_changes_an_id(drafts):
    """Guards against verification, or another row's prompt, in bfloat16."""
    model = model_of()
    plain = [generate(model, prompt, max_steps=24).predicted_tokens for prompt in PROMPTS]
    requests = [Request(prompt, eos_token_ids=[EOS]) for prompt in PROMPTS]
    for batch_size in (1, 3):
        found = in_batch(model, requests, batch_size, max_steps=24, **drafts)
        assert [found[row].predicted_tokens for row in range(len(PROMPTS))] == plain


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_only_long_passes_over_prompts_are_in_bfloat16(dtype, config):
    """Guards against an option without effect, an inexact product, a forgotten bias, and bfloat16 in drafts
    and verifications, however wide.
    """
    model = model_of(dtype, **config)
    exact = copy.deepcopy(model)
    fuse(exact, bfloat16_prefill=False)
    for ids, is_long in ((PROMPTS[1], True), (PROMPTS[1][: MIN_BFLOAT16_PREFILL - 1], False)):
        expected = states(exact, ids)
        assert torch.equal(states(model, ids, for_prompts=False), expected)
        assert (0 < error(states(model, ids), expected) < 2**-4) == is_long


@needs_kernels
def test_layers_that_are_not_fused_any_more():
    """Guards against an AttributeError: they have no copies in bfloat16."""
    model = copy.deepcopy(model_of())
    generate(model, PROMPTS[1], max_steps=2)
    model.config._attn_implementation = "eager"
    assert fuse(model) == 0
    assert len(ids_of(model, PROMPTS[1], max_steps=2)) == 2


@needs_kernels
@settings(max_examples=8)
@given(borders=st.lists(st.integers(1, 330), max_size=3).map(sorted))
def test_chunks_change_nothing_but_rounding(borders):
    """Guards against keys that a later chunk does not see, or sees twice."""
    whole, chunked = (states(model_of(), PROMPTS[1], *cuts) for cuts in ((), borders))
    assert error(chunked, whole) < 2**-4


@settings(max_examples=20)
@given(width=st.integers(1, 70), past=st.integers(0, 90), seed=st.integers(0, 99))
def test_attention_without_a_mask(width, past, seed):
    """Guards against wrong weights of the two parts of attention."""
    torch.manual_seed(seed)
    queries = torch.randn(2, 3, width, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 1, past + width, 8, dtype=torch.float64).expand(-1, -1, 3, -1, -1)
    mask = torch.ones(width, past + width, dtype=torch.bool).tril(past)
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, mask, scale=0.5)
    torch.testing.assert_close(attend_to_past(queries, keys, values, 0.5), expected)


@needs_kernels
def test_kept_prefixes_are_of_one_kind():
    """Guards against keys of a prompt in bfloat16 in an answer in float32, and the other way round."""
    model, strategy = copy.deepcopy(model_of()), make_strategy("autoregressive")
    for in_bfloat16, cached in ((True, 0), (True, 169), (False, 0), (False, 169), (True, 0)):
        if parts_of(model).prefills_in_bfloat16 != in_bfloat16 or not cached:
            fuse(model, bfloat16_prefill=in_bfloat16)
        assert answer_of(strategy, model, PROMPTS[0], reuse_cache=True).num_cached_tokens == cached


def has(monkeypatch, *, amx=False, avx512_bf16=False):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)


@needs_kernels
def test_loading(monkeypatch):
    """Guards against an option that is lost on the way."""
    has(monkeypatch, avx512_bf16=True)
    options = LoadingOptions(device="cpu", prefill_dtype="bfloat16")
    model, _ = load_model_and_tokenizer(default_model(), options)
    assert parts_of(model).prefills_in_bfloat16


@pytest.mark.parametrize("has_bfloat16", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scripts_read_prompts_as_transformers_does(
    monkeypatch, dtype, has_bfloat16, byte_tokenizer, tmp_path
):
    """Guards against prompts that take twice as long as those of transformers, and against rounded prompts of
    a checkpoint that has more bits.
    """
    has(monkeypatch, avx512_bf16=has_bfloat16)
    model = own_llama(vocab_size=len(byte_tokenizer)).to(dtype)
    model.save_pretrained(tmp_path)
    asked = LoadingOptions(device="cpu")
    found = with_fast_prompts(str(tmp_path), asked, load_config(str(tmp_path), asked)).prefill_dtype
    is_fast = dtype == torch.bfloat16 and has_bfloat16 and cpu_operators().variant is not None
    assert found == ("bfloat16" if is_fast else "auto")
    for others in ({"quantization": "int8"}, {"dtype": "float32"}):  # they have their own products
        given = replace(asked, **others)
        assert with_fast_prompts(str(tmp_path), given, load_config(str(tmp_path), asked)) == given


@pytest.mark.parametrize(
    ("options", "amx", "why"),
    [
        ({}, False, "neither AMX nor AVX512_BF16"),
        ({"dtype": "float32"}, True, "dtype auto"),
        ({"dtype": "bfloat16"}, True, "dtype auto"),
        ({"fuse": False}, True, "fuse True"),
        pytest.param({"quantization": "int8"}, True, "quantization none", marks=needs_operators),
    ],
)
def test_refusals(monkeypatch, options, amx, why):
    """Guards against an option that is ignored."""
    has(monkeypatch, amx=amx)
    with pytest.raises(LoadingError, match=f"^prefill_dtype .*{why}"):
        load_model_and_tokenizer(
            default_model(), LoadingOptions(**{"device": "cpu", "prefill_dtype": "bfloat16", **options})
        )


def test_refusals_of_devices_and_of_fuse():
    with pytest.raises(LoadingError, match="not for cuda; use --dtype bfloat16"):
        check_prefill_dtype(LoadingOptions(prefill_dtype="bfloat16"), torch.device("cuda"))
    model = own_llama()
    with pytest.raises(ValueError, match="need fused weights in 16 bits"):
        fuse(model, bfloat16_prefill=True)
    assert not parts_of(model).prefills_in_bfloat16
