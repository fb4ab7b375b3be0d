"""The decode paths on CUDA tensors in bfloat16 that have shapes, strides and devices, but no memory.

What only a GPU can do wrong is seen without one: a tensor on the wrong device, a mask that the attention
kernels reject or copy, attention that falls back to scores in memory, and kernels that are not needed.
"""

import subprocess
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import COPY, WAYS, config_of, generate
from helpers import watch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, MistralConfig, RepetitionPenaltyLogitsProcessor

from benchmarks.fake_gpu import DEVICE, Trace, fake_gpu, fake_model, is_there, tensors_of
from measures.comparison import find_difference
from self_speculation import Request, make_strategy
from self_speculation.backends import runners
from self_speculation.backends.card_runner import FusedRunner, why_no_kernels
from self_speculation.backends.card_runner import flash_attention as attention_of_passes
from self_speculation.backends.runner import PREFILL_CHUNK
from self_speculation.backends.runners import fuse
from self_speculation.engine.scheduler import Scheduler
from self_speculation.loading.loading import resolve_device
from self_speculation.machine.transfers import AsyncRead
from self_speculation.text import grammar
from self_speculation.text.grammar import Grammar, GrammarProcessor
from self_speculation.weights.int4_linear import has_kernel
from self_speculation.weights.kernels import cpu_operators

# Calls that read a tensor on the host, or give results whose shape depends on values.
READING = {"item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique"}


def attention(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False, **_):
    """Asks for what the fast kernels do. The one that knows of heads that share keys takes no mask."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert not (enable_gqa and attn_mask is not None), "math attention"
    assert enable_gqa or query.shape[:2] == key.shape[:2] == value.shape[:2], "math attention"
    for tensor in (query, key, value):
        assert is_aligned(tensor)
    if attn_mask is not None:
        assert attn_mask.dtype == query.dtype
        assert is_aligned(attn_mask.expand(*query.shape[:3], key.shape[2]))
    assert not (is_causal and query.shape[2] != key.shape[2])
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def flash_attention(query, key, value, scale):
    """Asks for what the kernel does: query heads may share keys."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert query.shape[1] % key.shape[1] == 0
    assert key.shape == value.shape
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    return attention_of_passes(query, key, value, scale)


def is_aligned(tensor):
    """At an address of a multiple of 16 bytes, as is every row."""
    offset = tensor.storage_offset() * tensor.itemsize
    return offset % 16 == 0 and tensor.stride(-1) == 1 and all(s % 8 == 0 for s in tensor.stride()[:-1])


class Waits(TorchDispatchMode):
    """Fails where the host would wait for the card, as it does for numbers, for shapes that depend on values,
    and for copies to or from memory that is not pinned.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        result = function(*args, **kwargs)
        tensors = tensors_of((args, kwargs))
        if any(map(is_there, tensors)):
            assert name not in READING
            assert not (name.startswith("index") and any(part.dtype == torch.bool for part in tensors))
        if name in ("_to_copy", "to", "copy_"):
            ends = (args[0], args[1] if name == "copy_" else result)
            host = [part for part in ends if part.device.type == "cpu"]
            if len(host) == 1:
                non_blocking = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
                assert non_blocking, f"{name} waits"
                assert name == "copy_" or hasattr(host[0], "has_pinned_memory"), "pageable memory"
        return result


@pytest.fixture
def gpu(monkeypatch):
    """A fake one, whose attention asks for what that of an H100 does."""
    for name, kernel in {
        "torch.nn.functional.scaled_dot_product_attention": attention,  # of layers of transformers
        "self_speculation.backends.card_runner.scaled_dot_product_attention": attention,
        "self_speculation.backends.card_runner.flash_attention": flash_attention,
    }.items():
        monkeypatch.setattr(name, kernel)
    with fake_gpu() as gpu:
        yield gpu


def model_of(heads=(6, 2), fused=True, window=None, head_dim=8):
    """Our kernels take heads of 64, and not those of 8."""
    size = {
        "vocab_size": 64, "hidden_size": 8 * heads[0], "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": heads[0], "head_dim": head_dim, "num_key_value_heads": heads[1],
        "max_position_embeddings": 4096,
    }  # fmt: skip
    model = fake_model(MistralConfig(**size, sliding_window=window) if window else LlamaConfig(**size))
    if fused:
        assert fuse(model) == 2
    return model


# By a model of two layers.
PATHS = {name: {**way, "exit_layer": 1} if way.get("exit_layer") == 2 else way for name, way in WAYS.items()}
PATHS |= {"copy": {**COPY, "exit_layer": 2}, "early exit": {"exit_layer": 1}}
BY_OUR_KERNELS = {"head_dim": 64}


@pytest.mark.parametrize(
    ("path", "captured", "model"),
    [
        ("plain", True, BY_OUR_KERNELS),
        ("layers", True, BY_OUR_KERNELS),
        ("adaptive", False, BY_OUR_KERNELS),
        ("plain", False, {}),
        ("adaptive", False, {}),
        ("copy", False, {"heads": (4, 4)}),
        ("layers", False, {"heads": (4, 1)}),
        ("layers", False, {"window": 5}),
        ("layers", False, {"window": 5, "fused": False}),
        *(
            pytest.param(path, False, {"fused": fused}, marks=pytest.mark.slow)
            for path in PATHS
            for fused in (True, False)
            if fused or "copy" not in path
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("triton_kernels", "gpu")
def test_every_path(path, captured, model):
    """Guards against a tensor made on the CPU, waits for the card, and attention that only a CPU is good at.

    Rows differ in length and settings, end, make room for other rows, and take slots that other rows have
    left. The last ones show drafts and look at them, as a grammar does.
    """
    config = config_of(sample=True, max_steps=6, reuse_cache=True, **PATHS[path])
    changes = [{"max_steps": 3}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}, {"sample": False}]
    processors = [RepetitionPenaltyLogitsProcessor(1.2), SimpleNamespace(masked=lambda ids, scores: scores)]
    requests = [
        Request([5, 6, 7, *[8] * i, 9], processors[:i], None, Mock() if i else None, i, config=changed)
        for i, changed in enumerate(replace(config, **each) for each in changes)
    ]
    model = model_of(**model)
    strategy = make_strategy(config.generation_strategy)
    if captured:
        runners.capture_decoding(model)
    with Waits():
        results = dict(strategy.generate_batch(model, requests, config, 2))
    assert [results[row].num_cached_tokens >= 3 for row in range(3)] == [False, False, True]


@pytest.mark.usefixtures("gpu")
def test_guided_decoding(byte_tokenizer):
    """Guards against numpy's arrays, which `torch.tensor` does not pin, and a pageable copy for a request."""
    grammar._byte_biases.cache_clear()
    processor = GrammarProcessor(Grammar.lark("start: <[0-300]>*"), byte_tokenizer, len(byte_tokenizer), [2])
    scores = torch.empty(1, len(byte_tokenizer), device=DEVICE)
    with Waits():
        assert processor.masked([5, 6], scores).device == scores.device
    grammar._byte_biases.cache_clear()


@pytest.mark.usefixtures("triton_kernels", "gpu")
def test_a_mask_is_made_while_the_next_pass_runs(monkeypatch):
    """Guards against a card that idles for each drafted token that a grammar follows, until the host has read
    it and made the next mask.
    """
    queued_before = {}
    waited = []
    passes = watch(monkeypatch, FusedRunner, "run_layers")

    def queue(reading, numbers):
        if len(numbers) == 1:  # drafted tokens
            queued_before[reading] = len(passes)

    def wait(reading):
        if reading in queued_before:
            waited.append(len(passes) - queued_before.pop(reading))

    processor = SimpleNamespace(masked=lambda ids, scores: scores)
    config = config_of(max_steps=20, **PATHS["layers"])
    requests = [Request([5, 6], [processor])]
    strategy = make_strategy(config.generation_strategy)
    with monkeypatch.context() as reads:  # it ends before the fake card does
        watch(reads, AsyncRead, "__init__", queue)
        watch(reads, AsyncRead, "wait", wait)
        dict(strategy.generate_batch(model_of(**BY_OUR_KERNELS), requests, config, 1))
    assert len(waited) > 4
    assert min(waited) >= 1


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("is_sampled", [False, True])
@pytest.mark.parametrize("num_drafted", [0, 2, 6])
@pytest.mark.usefixtures("triton_kernels")
def test_a_round_is_replays_and_a_read(num_drafted, is_sampled, num_rows, gpu, monkeypatch):
    """Guards against work of the host beside the replays of a round that goes on where the last one has left
    the card: fourteen launches a step cost more than the kernels of a small model. Guards against a card that
    idles until the host has read a round.
    """
    model = model_of(**BY_OUR_KERNELS)
    runners.capture_decoding(model)
    drafts = {"exit_layer": 1, "num_speculations": num_drafted} if num_drafted else {}
    config = config_of(max_steps=60, sample=is_sampled, top_p=0.9, **drafts)
    scheduler = Scheduler(make_strategy(config.generation_strategy), model, config, num_rows)
    for row in range(num_rows):
        scheduler.add_request(row, Request([5, 6, 7, *[8] * row], seed=row))
    scheduler.step()  # captures
    gpu.trace = Trace()
    replayed = []
    with monkeypatch.context() as reads:  # it ends before the fake card does
        watch(reads, AsyncRead, "wait", lambda *_: replayed.append(len(gpu.trace.replays)))
        scheduler.step()
    replays = gpu.trace.replays
    assert [len(replays)] == replayed == [num_drafted + 1]
    in_replays = sum(replay.stop - replay.start for replay in replays)
    # The keys of noise are copied to the card, and results from it.
    assert len(gpu.trace.launches) - in_replays == 1 + is_sampled


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.usefixtures("gpu")
def test_long_prompts(fused, window, monkeypatch):
    """Guards against scores in memory where a later chunk or a window needs a mask, against cuDNN's
    attention, which makes a plan for every number of keys, and against sums in fewer bits.
    """
    monkeypatch.setattr("torch.backends.cuda.enable_cudnn_sdp", (enable := Mock()))
    monkeypatch.setattr("torch.backends.cuda.matmul", (matmul := Mock()))
    model = model_of(fused=fused, window=window)
    for length in (PREFILL_CHUNK + 1, PREFILL_CHUNK + 37):
        generate(model, [5] * length, max_steps=2, eos=[])
    enable.assert_called_with(False)
    assert matmul.allow_bf16_reduced_precision_reduction is False
    assert matmul.allow_fp16_reduced_precision_reduction is False


@pytest.mark.usefixtures("triton_kernels")
def test_a_difference_is_looked_for_as_a_prompt(gpu, monkeypatch):
    """Guards against partial sums of attention for a whole history, gigabytes for a long one, and against
    operators of a CPU that are built for a model on a card.
    """
    model = model_of(**BY_OUR_KERNELS)
    monkeypatch.setattr("measures.comparison.rounds_prompts", Mock(side_effect=AssertionError))
    with pytest.raises(DynamicOutputShapeException):  # where it reads the logits
        find_difference(model, [5, 6, 7], [8, 9], [8, 10])
    assert not {"attend", "merge"} & {launch.name for launch in gpu.trace.launches}


NO_SIZE = "elements, not one of 64, 96, 128, 256"


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dim", "has_copies", "why"),
    [
        ("cpu", None, torch.float32, 64, cpu_operators().variant is not None, "they are for NVIDIA's cards"),
        ("cpu", None, torch.float64, 64, False, "they are for NVIDIA's cards"),
        ("mps", None, torch.float16, 64, False, "they are for NVIDIA's cards"),
        ("cuda", (7, 5), torch.float16, 64, False, "the card has compute capability 7.5, below 8.0"),
        ("cuda", (8, 0), torch.float32, 64, True, "activations are torch.float32, not in 16 bits"),
        ("cuda", (8, 0), torch.float16, 80, True, f"a head has 80 {NO_SIZE}"),
        ("cuda", (8, 0), torch.float16, 60, True, f"a head has 60 {NO_SIZE}"),
        ("cuda", (8, 0), torch.float16, 320, True, f"a head has 320 {NO_SIZE}"),
        ("cuda", (9, 0), torch.bfloat16, 96, True, None),
    ],
)
def test_what_kernels_take(device, capability, dtype, head_dim, has_copies, why, triton_kernels, monkeypatch):
    """Guards against an error in the middle of an answer: a kernel that does not assemble, or refuses."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_kernels, "try_out", lambda *_: None)
    device = torch.device(device)
    assert why_no_kernels.__wrapped__(device, dtype, head_dim) == why
    assert has_kernel(device, dtype) == has_copies


NO_COMPILER = RuntimeError("Failed to find C compiler.\nPlease specify via CC")
FAILED = subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"])


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (NO_COMPILER, r"\(RuntimeError: Failed to find C compiler. Please specify via CC\)"),
        (FAILED, r"\(CalledProcessError: Command '\['gcc', 'cuda_utils.c'\]' returned"),
        (AssertionError("libcuda.so cannot found!"), r"\(AssertionError: libcuda.so cannot found!\)"),
        (PermissionError(13, "Permission denied", "/.triton"), r"\(PermissionError: .*'/.triton'\)"),
    ],
    ids=["no compiler", "no headers", "no libcuda", "no cache"],
)
@pytest.mark.usefixtures("gpu")
def test_a_host_where_triton_cannot_launch(error, why, triton_kernels, monkeypatch):
    """Guards against a slim host where each model in 16 bits ends at the first token: triton builds a library
    at the first launch. There the kernels of torch decode.
    """
    why_no_kernels.cache_clear()
    monkeypatch.setattr(triton_kernels, "gated", Mock(side_effect=error))
    model = model_of(**BY_OUR_KERNELS)
    config = config_of(max_steps=4, **PATHS["layers"])
    answers = make_strategy(config.generation_strategy).generate_batch(model, [Request([5, 6])], config, 1)
    assert len(dict(answers)[0].predicted_tokens) == 4
    with pytest.warns(UserWarning, match=f"since triton cannot launch kernels here {why}"):
        runners.capture_decoding(model)
    why_no_kernels.cache_clear()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("lost")])
@pytest.mark.usefixtures("gpu")
def test_a_card_that_fails_is_no_reason(error, triton_kernels, monkeypatch):
    """Guards against a card that decodes without kernels since other programs had the memory for a moment."""
    why_no_kernels.cache_clear()
    monkeypatch.setattr(triton_kernels, "gated", Mock(side_effect=error))
    with pytest.raises(type(error), match=str(error)):
        model_of(**BY_OUR_KERNELS)
    why_no_kernels.cache_clear()


def test_a_kernel_is_tried(interpreter):
    """Guards against a try that launches nothing."""
    interpreter.try_out(torch.device("cpu"), torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_gpu_that_torch_does_not_see(monkeypatch):
    """Guards against hours on a CPU because of an old driver, unnoticed."""
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("os.path.exists", "/proc/driver/nvidia".__eq__)
    with pytest.warns(UserWarning, match="does not see this machine's NVIDIA GPU: .* driver 580"):
        resolve_device("auto")
