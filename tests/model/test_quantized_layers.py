"""Copies of layers in fewer bits: their products, their memory, and where there are none. That the output
does not depend on them is in test_self_speculation_generator.py and decoding/test_sampling_distribution.py.
"""

import copy

import pytest
import torch
from conftest import assert_close, generate, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig

import benchmark
import correctness
import generate as generate_script
import sweep
from self_speculation.model import low_bit_linear, quantized_layers
from self_speculation.model.fused_layers import Linear, bytes_made, fuse, fused_model
from self_speculation.model.loading import default_model, load_model_and_tokenizer
from self_speculation.model.low_bit_linear import Float16Head, Int4Linear, Int8Linear
from self_speculation.model.model_runner import ModelRunner, forward
from self_speculation.model.quantized_layers import formats, quantized

PROMPT = [5, 9, 4, 7, 7, 3]
SPECULATION = ["--generation_strategy", "self_speculative", "--exit_layer", "2", "--num_speculations", "3"]


# Not every processor has a kernel for it.
HAS_FLOAT16 = low_bit_linear.works(Float16Head, torch.device("cpu"), torch.float32)
needs_float16 = pytest.mark.skipif(not HAS_FLOAT16, reason="no kernel here")


def meant_by_sixteen_bits(weight):
    return weight.half().float()


def meant_by_eight_bits(weight):
    steps, scales = low_bit_linear._in_eight_bits(weight)
    return steps.float() * scales.float()[:, None]


def meant_by_four_bits(weight):
    """What steps, scales and middles stand for; input sizes beyond whole groups are padded."""
    padded = low_bit_linear._padded(weight)
    counts = nn.functional.pad(torch.ones(weight.shape[1]), (0, padded.shape[1] - weight.shape[1]))
    steps, numbers = low_bit_linear.in_four_bits(padded, counts)
    scales, middles = (part.float().repeat_interleave(32, 0).T for part in numbers.unbind(2))
    return ((steps - 8) * scales + middles)[: len(weight), : weight.shape[1]]


@pytest.mark.parametrize("width", [1, 2, 5, 17])
@pytest.mark.parametrize("shape", [(64, 32), (2128, 96), (50, 48), (2100, 576), (40, 100), (17, 33)])
@pytest.mark.parametrize(
    ("kind", "meant", "error"),
    [
        pytest.param(Float16Head, meant_by_sixteen_bits, 1e-3, marks=needs_float16),
        (Int8Linear, meant_by_eight_bits, 0.02),
        (Int4Linear, meant_by_four_bits, 0.13),
    ],
)
def test_the_kernel_multiplies_by_what_was_packed(kind, meant, error, shape, width):
    """Guards against another order of steps, scales or middles than the kernel's, parts of a large weight
    that cannot be packed one by one, padding that counts, and reading beyond the end of a row: for whole
    blocks and groups, and for neither.
    """
    torch.manual_seed(0)
    linear = nn.Linear(*reversed(shape)).requires_grad_(False)
    product = Linear(linear)
    x = torch.randn(width, shape[1]).to(torch.bfloat16).float()
    copied = kind(product)
    approximate = meant(product.weight)
    assert (approximate - product.weight).norm() < error * product.weight.norm()
    wanted = x @ approximate.T + linear.bias
    got = copied(x)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    # Weights are rounded to the format of the product on their way, and so is the result, or every sum.
    assert_close(got, wanted, computed_in=kind.dtype, roundings=2 if kind.dtype == torch.bfloat16 else 32)
    hidden = torch.randn(width, shape[0])
    assert_close(copied.add_to(hidden.clone(), x), hidden + got, roundings=2)
    assert copied.unconverted(x).dtype == kind.dtype
    if kind is Float16Head:  # what it holds is the kernel's business
        return
    held = [value for value in vars(copied).values() if isinstance(value, torch.Tensor)]
    assert sum(t.nbytes for t in held) == copied.num_bytes + 2 * len(linear.bias)


def test_four_bits_reach_the_ends_of_a_group():
    """Guards against a range around zero only: what lies on one side of it needs all 16 steps too."""
    weight = torch.linspace(3.0, 4.0, 32)[None]
    steps, _ = low_bit_linear.in_four_bits(weight, torch.ones(32))
    assert steps.min() == 0
    assert steps.max() == 15
    assert (meant_by_four_bits(weight) - weight).abs().max() < 0.6 / 15 + 4 * 2**-8
    assert not meant_by_four_bits(torch.zeros(1, 32)).any()


def test_the_columns_that_count_are_closest():
    """Guards against a rounding that ignores which inputs are large: their errors are those of the output."""
    torch.manual_seed(0)
    weight, squares = torch.randn(200, 32), torch.ones(32)
    squares[::8] = 100.0

    def error(counts):
        steps, numbers = low_bit_linear.in_four_bits(weight, counts)
        scales, middles = numbers[0].float().unbind(1)
        off = (steps - 8) * scales[:, None] + middles[:, None] - weight
        return (off.square() @ squares).mean()

    assert error(squares) < 0.7 * error(torch.ones(32))
    twin, watched = tiny_llama(fused=True), {}
    runner = ModelRunner(twin, 6, 20)
    watched = quantized_layers._squares_of_inputs(runner, runner.layers)
    assert set(watched) == {product for layer in runner.layers for product in layer.linears}
    assert all(len(squares) == product.weight.shape[1] for product, squares in watched.items())
    assert runner.cache.length(0) == 0


def test_what_other_devices_are_given():
    """Guards against pairs of steps in the wrong order, the first of each in the upper half of a byte; and
    against tiles that do not divide the input size.
    """
    packed = []

    def convert(pairs, tiles):
        packed.append((pairs.tolist(), tiles))
        return pairs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", convert)
        for columns in (32, 64, 96, 128):
            low_bit_linear._packed(torch.arange(columns, dtype=torch.int32)[None] % 16)
    assert [tiles for _, tiles in packed] == [2, 4, 2, 8]
    assert packed[0][0] == [[0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 2]


@pytest.mark.parametrize(("weights", "error"), [("int8", 0.1), ("int4", 0.5)])
def test_copies_are_made_once_over_the_same_cache(weights, error):
    """Guards against a copy for every generation, and layers in an order that is not theirs."""
    model = tiny_llama.__wrapped__(fused=True)
    runner = ModelRunner(model, 6, 20)
    twin = quantized(runner, 3, weights)
    assert len(twin.layers) == 3
    assert twin.cache is runner.cache
    again = quantized(ModelRunner(model, 6, 20), 4, weights)
    for part, other in ((again.layers[0], twin.layers[0]), (again.head, twin.head)):
        assert all(mine is theirs for mine, theirs in zip(part.linears, other.linears, strict=True))
    assert fused_model(model)[0][0] is runner.layers[0]  # as it was
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        wanted = forward(ModelRunner(model, 6, 6), ids, 6).logits
        got = forward(quantized(ModelRunner(model, 6, 6), 4, weights), ids, 6).logits
    assert (got - wanted).norm() < error * wanted.norm()


def test_at_full_depth_they_guess_almost_everything():
    """Guards against copies that decode, and guess worse than their bits allow. By a trained model: the best
    and the second best guess of a random one are too close.
    """
    model, tokenizer = load_model_and_tokenizer(default_model())
    prompt = tokenizer.encode("def parse_header(line):\n")
    depth = model.config.num_hidden_layers
    for weights, accepted in (("int8", 0.9), ("int4", 0.8)):
        result = generate(
            model, prompt, max_steps=80, eos=[], exit_layer=depth, num_speculations=4, draft_weights=weights
        )
        assert result.acceptance_rate > accepted


def test_inputs_are_weighed_in_passes_over_many_tokens(monkeypatch):
    """Guards against tokens that are looked at one by one, so that attention has nothing to attend to: what
    the products after it read is then nothing like what they read of a text.
    """
    passes, run = [], quantized_layers.forward_early
    monkeypatch.setattr(
        quantized_layers,
        "forward_early",
        lambda runner, ids, *args, **options: (
            passes.append(ids.shape[1]) or run(runner, ids, *args, **options)
        ),
    )
    for context, widths in ((256, [64] * 4), (32, [32] * 8)):
        model = copy.deepcopy(tiny_llama(max_position_embeddings=context))
        fuse(model)
        passes.clear()
        generate(model, [3, 4], exit_layer=4, num_speculations=2, draft_weights="int4", max_steps=3)
        assert passes == widths


def test_memory_that_is_not_there_is_refused(monkeypatch):
    """Guards against a machine that is brought to its knees by a second model."""
    model = tiny_llama.__wrapped__(num_layers=3, fused=True)
    of_layers, of_head = formats("int4", model.device, model.dtype)
    *layers, head = (form.linears for form in (*fused_model(model)[0][:2], fused_model(model)[1]))
    needed = sum(of_layers.bytes_of(product.shape) for linears in layers for product in linears)
    needed += of_head.bytes_of(head[0].shape)
    runner = ModelRunner(model, 6, 20)
    packed = bytes_made(model)
    monkeypatch.setattr(quantized_layers, "free_memory", lambda *_: needed - 1)
    with pytest.raises(ValueError, match=r"draft_weights int4: takes 0.00 GiB more .* 0.00 GiB are free"):
        quantized(runner, 2, "int4")
    monkeypatch.setattr(quantized_layers, "free_memory", lambda *_: needed)
    quantized(runner, 2, "int4")
    assert bytes_made(model) == packed + needed
    monkeypatch.setattr(quantized_layers, "free_memory", lambda *_: 0)
    quantized(runner, 2, "int4")  # it is there already
    with pytest.raises(ValueError, match="draft_weights int4: takes"):
        quantized(runner, 3, "int4")


def test_want_of_memory_is_no_want_of_a_kernel():
    """Guards against drafts in fewer bits that are refused for ever because memory was short once."""
    errors: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory")]

    class Linear(low_bit_linear.Int8Linear):
        def __call__(self, x):
            if errors:
                raise errors.pop()
            return super().__call__(x)

    class Missing(Linear):
        def __call__(self, x):
            raise NotImplementedError("no such kernel")

    asked = (torch.device("cpu"), torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        low_bit_linear.works(Linear, *asked)
    assert low_bit_linear.works(Linear, *asked)
    assert not low_bit_linear.works(Missing, *asked)


def test_what_pays_on_a_gpu(monkeypatch):
    """Guards against drafts that take longer than the model: torch's kernel for eight bits is slow there."""
    monkeypatch.setattr(quantized_layers, "works", lambda *_: True)
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match=r"draft_weights int8: .*slower on a GPU.*use int4"):
        formats("int8", gpu, torch.bfloat16)
    assert formats("int4", gpu, torch.bfloat16) == (Int4Linear, None)
    assert formats("int4", torch.device("cpu"), torch.float32) == (Int4Linear, Float16Head)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_where_there_are_no_copies(weights):
    """Guards against "a known family" that nobody names, and a layer that nobody was told to fuse."""
    drafts = {"exit_layer": 2, "num_speculations": 2, "draft_weights": weights}
    with pytest.raises(ValueError, match=rf"draft_weights {weights}: needs fused layers, so fuse\(model\)"):
        generate(tiny_llama(), PROMPT, **drafts)
    gemma = AutoModelForCausalLM.from_config(OF_GEMMA).eval()
    families = "no copies of a gemma model, only of llama, mistral, ministral, qwen2, qwen3, seed_oss"
    with pytest.raises(ValueError, match=f"draft_weights {weights}: there are {families}"):
        generate(gemma, PROMPT, **drafts)


OF_GEMMA = GemmaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, vocab_size=50,
)  # fmt: skip


@pytest.mark.parametrize("script", ["generate", "benchmark"])
def test_a_family_without_copies_is_refused_before_it_is_loaded(script, tmp_path, monkeypatch, capsys):
    """Guards against minutes of loading before one line that the config could have told."""
    OF_GEMMA.save_pretrained(tmp_path / "model")  # there are no weights
    monkeypatch.setattr("runs.startup.load_model_and_tokenizer", lambda *_: pytest.fail("it was loaded"))
    called, how = SCRIPTS[script]
    with pytest.raises(SystemExit) as end:
        called.main(
            ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path), "--draft_weights", "int8",
             *how, *SPECULATION]
        )  # fmt: skip
    assert end.value.code == 2
    assert "--draft_weights int8: there are no copies of a gemma model" in capsys.readouterr().err


SCRIPTS = {
    "generate": (generate_script, ["--prompt", "Once"]),
    "benchmark": (benchmark, ["--num_samples", "1"]),
    "correctness": (correctness, ["--num_samples", "1"]),
    "sweep": (sweep, ["--num_samples", "1", "--exit_layer_last", "2"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model_args", "attn_implementation=eager"], "needs fused layers"),
        (["--no_room"], "more than the model, and 0.00 GiB are free"),
    ],
)
def test_scripts_refuse_in_one_line(name, flags, said, model_folder, tmp_path, monkeypatch, capsys):
    """Guards against a traceback where a model turns out not to be fused, or too large, when it is loaded."""
    if flags == ["--no_room"]:
        monkeypatch.setattr(quantized_layers, "free_memory", lambda *_: 0)
        flags = []
    script, how = SCRIPTS[name]
    speculation = [] if name == "sweep" else SPECULATION
    with pytest.raises(SystemExit) as end:
        script.main(
            ["--model", str(model_folder), "--output_dir", str(tmp_path), "--draft_weights", "int4",
             *how, *speculation, *flags]
        )  # fmt: skip
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: --draft_weights int4: " in error
    assert said in error
