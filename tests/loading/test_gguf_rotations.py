"""Rotations that `.gguf` files scale, and models whose head size is not hidden size / heads."""

import math

import numpy as np
import pytest
import torch
from conftest import assert_close, own_llama
from helpers import error_line
from test_gguf import write
from test_llama_model_utils import family

from self_speculation import LoadingError, LoadingOptions, load_model_and_tokenizer
from self_speculation.models.families import context_length

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500000.0,
}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
YARN_KEYS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
}  # fmt: skip
FULL, WINDOWS = "full_attention", "sliding_attention"
GEMMA = {
    "num_hidden_layers": 6, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16,
    "max_position_embeddings": 512,
}  # fmt: skip
GEMMA_KEYS = {"attention.key_length": 24, "attention.value_length": 24, "attention.sliding_window": 16}
SHORT, LONG = [1.0, 1.25, 1.5, 3.5, 7.25, 8.0], [1.0, 4.0, 9.5, 11.0, 12.0, 13.0]
LONGROPE = {
    "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "rope_theta": 10000.0, "factor": 4.0,
    "partial_rotary_factor": 0.75, "original_max_position_embeddings": 256,
}  # fmt: skip
LONGROPE_KEYS = {
    "rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(256)), "rope.dimension_count": 12,
    "rope.scaling.original_context_length": 256, "attention.sliding_window": 0,
}  # fmt: skip


def llama3_divisors(head_dim):
    """As the converter writes them: https://github.com/ggml-org/llama.cpp, conversion/llama.py."""
    divisors = []
    for i in range(0, head_dim, 2):
        turns = LLAMA3["original_max_position_embeddings"] / (
            2 * math.pi * LLAMA3["rope_theta"] ** (i / head_dim)
        )
        between = min(1, max(0, (turns - 1) / (4 - 1)))
        divisors.append(1 / ((1 - between) / LLAMA3["factor"] + between))
    return divisors


# Family, rotation, other settings, and the keys and tensors that a file has of them.
CASES = {
    "llama3": (
        "llama", LLAMA3, {}, {"rope.scaling.original_context_length": 64},
        {"rope_freqs.weight": llama3_divisors(16)},
    ),
    "linear": ("llama", LINEAR, {}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
    "linear, old key": ("llama", LINEAR, {}, {"rope.scale_linear": 4.0}, {}),
    "none": ("llama", DEFAULT, {}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "yarn": ("qwen2", YARN, {"max_position_embeddings": 512}, YARN_KEYS, {}),
    "yarn, all keys": (
        "qwen2", {**YARN, "attention_factor": 0.75, "beta_fast": 16.0, "beta_slow": 0.5},
        {"max_position_embeddings": 512},
        {**YARN_KEYS, "rope.scaling.yarn_attn_factor": 0.75, "rope.scaling.yarn_beta_fast": 16.0,
         "rope.scaling.yarn_beta_slow": 0.5}, {},
    ),
    "longrope, a part of each head": (
        "phi3", LONGROPE, {"original_max_position_embeddings": 256}, LONGROPE_KEYS,
        {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG},
    ),
    "by layer type": (
        "gemma3_text",
        {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, WINDOWS: DEFAULT},
        GEMMA, {**GEMMA_KEYS, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {},
    ),
    "another base in windows": (
        "gemma3_text",
        {FULL: {**DEFAULT, "rope_theta": 1e6}, WINDOWS: {**DEFAULT, "rope_theta": 500.0}},
        GEMMA, {**GEMMA_KEYS, "rope.freq_base_swa": 500.0}, {},
    ),
    "size of heads": (
        "qwen3", DEFAULT, {"head_dim": 24},
        {"attention.key_length": 24, "attention.value_length": 24}, {},
    ),
}  # fmt: skip


@pytest.fixture
def in_file(byte_tokenizer, tmp_path):
    """Writes the model of a case; returns it, the file, and the model that is read from the file."""

    def write_and_read(case):
        kind, rope, settings, keys, tensors = CASES[case]
        shape = {"vocab_size": len(byte_tokenizer), "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 3}
        shape |= {"max_position_embeddings": 1024, "rope_parameters": rope}
        model = family(kind, **{**shape, **settings}).float()
        file = str(tmp_path / "x.gguf")
        write(file, model, byte_tokenizer, keys=keys, tensors=tensors)
        return model, file, load_model_and_tokenizer(file, LoadingOptions(dtype="float32"))[0]

    return write_and_read


@pytest.mark.parametrize("case", CASES)
def test_a_file_rotates_as_the_model_it_was_written_from(case, in_file):
    """Guards against wrong text: tensors and keys of rotations and of heads that are not read; and against a
    context that ends where frequencies of Phi-3 change: those of Llama 3 do not.
    """
    model, _, loaded = in_file(case)
    assert context_length(loaded.config) == context_length(model.config)
    ids = (torch.arange(200) * 37 % model.config.vocab_size)[None]
    with torch.inference_mode():
        assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("keys", "tensors", "says"),
    [
        ({"rope.scaling.alpha": 2.0}, {}, "rope.scaling.alpha 2.0 in a llama file: such rotations"),
        ({"rope.scaling.type": "ntk"}, {}, "llama.rope.scaling.type 'ntk'"),
        ({"rope.scaling.attn_factor": 2.0}, {}, "llama.rope.scaling.attn_factor 2.0"),
        ({"rope.freq_base_swa": 10.0}, {}, "llama.rope.freq_base_swa 10.0"),
        ({"rope.dimension_count_swa": 4}, {}, "llama.rope.dimension_count_swa 4"),
        ({"attention.key_length": 32}, {}, "llama.rope.dimension_count 16"),
        (YARN_KEYS, {"rope_freqs.weight": [1.0] * 8}, "llama.rope.scaling.type 'yarn'"),
        ({}, {"rope_freqs.weight": [1.0] * 7}, "rope_freqs.weight has 7 numbers, not 8"),
        ({}, {"rope_factors_long.weight": [1.0] * 8}, "rope_factors_short.weight is missing"),
        ({}, {"blk.1.attn_q.bias": [1.0] * 64}, "blk.1.attn_q.bias is no tensor of a llama model"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(keys, tensors, says, byte_tokenizer, tmp_path):
    """Guards against wrong text without a word: a key or tensor that is skipped."""
    model = own_llama(vocab_size=len(byte_tokenizer), head_dim=16)
    write(tmp_path / "x.gguf", model, byte_tokenizer, keys=keys, tensors=tensors)
    assert says in error_line(LoadingError, load_model_and_tokenizer, str(tmp_path / "x.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CASES if case != "yarn, all keys"]
)  # it reads three of them not
def test_logits_are_those_of_llama_cpp(case, in_file):
    """Guards against keys that mean something else there."""
    library = pytest.importorskip("llama_cpp")
    _, file, loaded = in_file(case)
    ids = [i * 37 % loaded.config.vocab_size for i in range(200)]
    other = library.Llama(file, n_ctx=256, logits_all=True, type_k=0, type_v=0, verbose=False)
    other.eval(ids)
    with torch.inference_mode():
        logits = loaded(torch.tensor([ids])).logits[0]
    assert_close(torch.from_numpy(np.array(other.scores[:200])), logits, roundings=3000)
