"""The decode paths on CUDA tensors in bfloat16 that have shapes, strides and devices, but no memory.

What only a GPU can do wrong is seen without one: a tensor on the wrong device, a mask that the attention
kernels reject or copy, attention that falls back to scores in memory, and kernels that are not needed.
"""

import contextlib
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import COPY, PROMPT, WAYS, config_of, generate, ids_of, own_llama, scheduler_of
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, RepetitionPenaltyLogitsProcessor

from benchmarks import estimates
from self_speculation import LoadingOptions, Request, Sampler, load_model_and_tokenizer, make_strategy
from self_speculation import self_speculation_generator as generator
from self_speculation.decoding import grammar
from self_speculation.decoding.grammar import Grammar, GrammarProcessor
from self_speculation.loading.loading import resolve_device
from self_speculation.passes import captured_runner, runners
from self_speculation.passes.attention import AttentionKernel, attention_kernel
from self_speculation.passes.fused_layers import _MOST_GROUPED, FusedRunner
from self_speculation.passes.model_runner import PREFILL_CHUNK, forward_early
from self_speculation.passes.runners import fuse, make_runner
from self_speculation.transfers import AsyncRead

DEVICE = "cuda:0"

# (heads, heads of keys): shared by none, by some, by all.
HEADS = [(4, 4), (6, 2), (4, 1)]
# Calls that read a tensor on the host, or give results whose shape depends on values.
READING = {"item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique"}
VIEWS = {
    "alias", "as_strided", "chunk", "detach", "expand", "narrow", "permute", "select", "slice", "split",
    "split_with_sizes", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


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


def flash_attention(query, key, value, dropout, is_causal, scale):
    """Asks for what the kernel does: query heads may share keys."""
    assert dropout == 0.0
    assert query.dtype == key.dtype == value.dtype != torch.float32
    assert query.shape[1] % key.shape[1] == 0
    assert key.shape == value.shape
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, is_causal, scale=scale
    )


def efficient_attention(query, key, value, bias, log_sums, dropout, is_causal, scale):
    """Asks for what the kernel does, which neither expands nor copies a mask."""
    assert (dropout, is_causal and bias is not None) == (0.0, False)
    assert query.dtype == key.dtype == value.dtype != torch.float64
    assert query.shape[:2] == key.shape[:2]
    assert key.shape == value.shape
    assert all(map(is_aligned, (query, key, value)))
    if bias is not None:
        assert (bias.dtype, bias.shape) == (query.dtype, (*query.shape[:3], key.shape[2]))
        assert is_aligned(bias)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, log_sums, dropout, is_causal, scale=scale
    )


class OnMeta(TorchFunctionMode):
    """Some calls ask CUDA for its current device, which a torch without it cannot: they run on "meta"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error):
                raise
        tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        assert len({tensor.device for tensor in tensors if tensor.dim()}) == 1
        result = function(*moved(args, "meta"), **moved(kwargs, "meta"))
        is_in_place = function.__name__.endswith("_") and not function.__name__.endswith("__")
        return args[0] if is_in_place else moved(result, DEVICE)


def moved(values, device):
    return tree_map_only(
        torch.Tensor,
        lambda part: torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=device),
        values,
    )


def is_aligned(tensor):
    """At an address of a multiple of 16 bytes, as is every row."""
    offset = tensor.storage_offset() * tensor.itemsize
    return offset % 16 == 0 and tensor.stride(-1) == 1 and all(s % 8 == 0 for s in tensor.stride()[:-1])


class Kernels(TorchDispatchMode):
    """Names of what was called, and of what is more than a view."""

    def __init__(self):
        super().__init__()
        self.calls, self.kernels, self.copied = [], [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in ("device", "empty_strided"):
            self.calls.append(name)
            is_view = name in VIEWS or (name in ("reshape", "to", "type_as") and shares(result, args[0]))
            self.kernels += [] if is_view else [name]
            if name in ("clone", "_to_copy", "to", "copy_", "cat", "contiguous") and not is_view:
                self.copied = max(self.copied, result.numel())
        return result


def shares(one, other):
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def pinned(part):
    """In the place of `pin_memory`, and of pinned memory."""
    assert part.device.type == "cpu", "only dense CPU tensors can be pinned"
    part.has_pinned_memory = True
    return part


class Waits(TorchDispatchMode):
    """Fails where the host would wait for the card, as it does for numbers, for shapes that depend on values,
    and for copies to or from memory that is not pinned.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        result = function(*args, **kwargs)
        tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        if any(part.device.type == "cuda" for part in tensors):
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


class CurrentDevice:
    """At first it is another one than the model's."""

    index = 1

    def exchange(self, index):
        before = self.index
        self.index = before if index < 0 else index
        return before


@pytest.fixture
def cuda(monkeypatch):
    """Makes models of fake tensors; whatever is read from the device is drawn."""
    draws, matches, tensor, zeros = random.Random(0), generator.leading_matches, torch.tensor, torch.zeros
    start_reading, empty = AsyncRead.__init__, torch.empty

    def drawn(part):
        """Ids, or numbers between 0 and 1; nothing is damaged."""
        if part.dtype == torch.bool:
            return 0
        return draws.random() if part.is_floating_point() else draws.randrange(5, 60)

    def read(numbers):
        torch.cat([part.flatten().float() for part in numbers])
        return [
            [draws.randint(0, most) for most in part.most]
            if hasattr(part, "most")
            else [drawn(part) for _ in range(part.numel())]
            for part in numbers
        ]

    def few_accepted(drafted, tokens, lengths):
        """As many as there can be are drawn when they are read."""
        accepted = matches(drafted, tokens, lengths)
        accepted.most = lengths
        return accepted

    def fake_tensor(data, dtype=None, device=None, pin_memory=False):
        assert not pin_memory or isinstance(data, list), "Can't pin tensor constructed from numpy"
        made = tensor(data, dtype=dtype)
        return empty(made.shape, dtype=made.dtype, device=device)

    def fake_empty(*size, pin_memory=False, **kind):
        made = empty(*size, **kind)
        return pinned(made) if pin_memory else made

    def queue(reading, numbers):
        reading.numbers = numbers
        start_reading(reading, numbers)

    def new_zeros(like, *size, **kind):
        return zeros(*size, **{"dtype": like.dtype, "device": like.device, **kind})

    current = CurrentDevice()

    def from_dlpack(part):
        assert part.device.index == current.index, "Can't export tensors on a different CUDA device index"
        return part

    with torch.device("cpu"):  # torch caches its constructors at the first context, here before the patches
        torch.empty(0)
    package = "self_speculation"
    for name, value in {
        "torch.nn.functional.scaled_dot_product_attention": attention,  # of layers of transformers
        f"{package}.passes.attention.flash_attention": flash_attention,
        f"{package}.passes.attention.efficient_attention": efficient_attention,
        "torch.backends.cuda.enable_cudnn_sdp": lambda enabled: None,
        "torch.cuda.get_device_capability": lambda device: (9, 0),
        "torch.cuda.mem_get_info": lambda device: (2**36, 2**36),
        # A parameter of no memory is no `Parameter`, and nowhere.
        f"{package}.passes.fused_layers.difference": lambda *modules: None,
        f"{package}.passes.layers.weights_key": lambda model: (),
        "torch.from_dlpack": from_dlpack,
        "torch.cuda._exchange_device": current.exchange,
        "torch.cuda._maybe_exchange_device": current.exchange,
        # Reads, and events for them.
        f"{package}.self_speculation_generator.leading_matches": few_accepted,
        f"{package}.transfers.AsyncRead.__init__": queue,
        f"{package}.transfers.AsyncRead.wait": lambda reading: read(reading.numbers),
        f"{package}.transfers.Stopwatch._event": lambda stopwatch: None,
        f"{package}.transfers._event": lambda device: None,
        # Fake mode holds on one thread.
        f"{package}.passes.quantized_layers.ThreadPoolExecutor": lambda number: contextlib.nullcontext(
            SimpleNamespace(map=map)
        ),
        # These draw by a generator of CUDA's.
        "torch.Tensor.normal_": lambda tensor, *_, **__: tensor,
        "torch.Tensor.uniform_": lambda tensor, *_, **__: tensor,
        # These make real memory even so.
        "torch.tensor": fake_tensor,
        "torch.empty": fake_empty,
        "torch.Tensor.pin_memory": pinned,
        "torch.Tensor.new_zeros": new_zeros,
    }.items():
        monkeypatch.setattr(name, value)

    def make(heads=(6, 2), fused=True, num_layers=2, dtype=torch.bfloat16, window=None, head_dim=8):
        """Our kernels take heads of 64, and not those of 8."""
        size = {
            "vocab_size": 64, "hidden_size": 8 * heads[0], "intermediate_size": 96,
            "num_hidden_layers": num_layers, "num_attention_heads": heads[0], "head_dim": head_dim,
            "num_key_value_heads": heads[1], "max_position_embeddings": 4096,
        }  # fmt: skip
        settings = MistralConfig(**size, sliding_window=window) if window else LlamaConfig(**size)
        with torch.no_grad(), torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()
        if fused:
            assert fuse(model) == num_layers
        return model

    with FakeTensorMode(), OnMeta():
        yield make


# By a model of two layers.
PATHS = {name: {**way, "exit_layer": 1} if way.get("exit_layer") == 2 else way for name, way in WAYS.items()}
PATHS |= {"copy": {**COPY, "exit_layer": 2}, "early exit": {"exit_layer": 1}}


slow = pytest.mark.slow


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("path", ["plain", "layers", "adaptive"])
def test_every_path_by_our_kernels(cuda, path):
    """Guards against a tensor made on the CPU, and waits for the card, where our kernels attend."""
    every_path(cuda, path, head_dim=64)


@pytest.mark.parametrize(
    ("path", "heads", "fused", "window"),
    [
        *((path, HEADS[1], True, None) for path in ("plain", "early exit", "adaptive")),
        ("copy", HEADS[0], True, None),
        *(("layers", heads, True, None) for heads in (HEADS[0], HEADS[2])),
        *(("layers", HEADS[1], fused, 5) for fused in (True, False)),
        # How drafts end or where they come from has little to do with layers.
        *(
            pytest.param(path, HEADS[1], True, None, marks=slow)
            for path in ("layers", "n-grams", "adaptive copy")
        ),
        *(pytest.param(path, HEADS[1], False, None, marks=slow) for path in PATHS if "copy" not in path),
    ],
)
def test_every_path(cuda, path, heads, fused, window):
    """Guards against a tensor made on the CPU, waits for a card, and attention that only a CPU is good at."""
    every_path(cuda, path, heads=heads, fused=fused, window=window)


def every_path(cuda, path, **model):
    """One row; then rows that differ in length and settings, end, make room for others, and take what others
    have left.
    """
    config = config_of(sample=True, max_steps=6, reuse_cache=True, **PATHS[path])
    own = [{"max_steps": 3}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}, {"sample": False}]
    processors = [RepetitionPenaltyLogitsProcessor(1.2)]
    requests = [
        Request([5, 6, 7, *[8] * i, 9], processors * i, config=replace(config, **each), seed=i)
        for i, each in enumerate(own)
    ]
    model, strategy = cuda(**model), make_strategy(config.generation_strategy)
    with Waits():
        results = dict(strategy.generate_batch(model, requests, config, 2))
    assert [results[row].num_cached_tokens >= 3 for row in range(3)] == [False, False, True]
    if path == "layers":
        generate(model, [5, 6, 7], max_steps=3, eos=[], **PATHS[path])


@pytest.mark.usefixtures("cuda")
def test_guided_decoding(byte_tokenizer):
    """Guards against numpy's arrays, which `torch.tensor` does not pin, and a pageable copy for a request."""
    grammar._byte_biases.cache_clear()
    own = GrammarProcessor(Grammar.lark("start: <[0-300]>*"), byte_tokenizer, len(byte_tokenizer), [2])
    scores = torch.empty(1, len(byte_tokenizer), device=DEVICE)
    with Waits():
        assert own.masked([5, 6], scores).device == scores.device
    grammar._byte_biases.cache_clear()


def rows_of(runner, lengths, depth):
    """A cache with rows of such lengths, whose first layers have read their prompts."""
    cache = runner.new_cache(30, max(lengths) + 70, len(lengths))
    cache.set_rows([])
    for row, length in enumerate(lengths):
        prompt = torch.zeros(1, length, dtype=torch.long, device=DEVICE)
        forward_early(runner, cache.prompt_view(row), prompt, depth, num_logits=0)
        cache.add_row(length)
    return cache


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("fused", [True, False])
def test_long_prompts(cuda, fused, window):
    """Guards against scores in memory where a later chunk or a window needs a mask."""
    model = cuda(fused=fused, window=window)
    for length in (PREFILL_CHUNK + 1, PREFILL_CHUNK + 37):
        generate(model, [5] * length, max_steps=2, eos=[])


@pytest.mark.parametrize(
    ("dtype", "capability", "head_dim", "kernel"),
    [
        (torch.bfloat16, (9, 0), 128, "flash"),
        (torch.float16, (8, 0), 128, "flash"),
        (torch.float16, (7, 5), 128, "efficient"),
        (torch.bfloat16, (7, 5), 128, "any"),
        (torch.float16, (8, 0), 320, "efficient"),
        (torch.float16, (8, 0), 60, "any"),
        (torch.float32, (9, 0), 128, "efficient"),
        (torch.float64, (9, 0), 128, "any"),
    ],
)
def test_kernel_of_attention(dtype, capability, head_dim, kernel, monkeypatch):
    """Guards against formats that a kernel does not take."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert attention_kernel(torch.device(DEVICE), dtype, head_dim).value == kernel


@pytest.mark.parametrize(("dtype", "plain"), [(torch.bfloat16, "flash"), (torch.float32, "efficient")])
def test_operators_of_attention(cuda, dtype, plain):
    """Guards against cuDNN's attention, which makes a plan for every number of keys and which
    `scaled_dot_product_attention` may pick, in models that the user has loaded.
    """
    masked = "efficient"

    def called(lengths, *widths):
        """By passes over the prompts of such rows, and of such widths over all rows."""
        runner = make_runner(model)
        with torch.inference_mode(), Kernels() as ran:
            cache = rows_of(runner, lengths, 1)
            for width in widths:
                ids = torch.zeros(len(lengths), width, dtype=torch.long, device=DEVICE)
                forward_early(runner, cache, ids, 1, num_logits=0)
        return [name.split("_")[4] for name in ran.calls if "scaled_dot_product" in name]

    model = cuda(dtype=dtype, num_layers=1, window=60)  # hides nothing yet
    assert called([30], 1, 5) == [plain] * 3
    assert called([65], 1, 5) == [masked, plain, masked]
    model = cuda(dtype=dtype, num_layers=1)
    assert called([30], 1, 5, _MOST_GROUPED + 4) == [plain] * 4
    assert called([30, 30], 1, 5) == [plain] * 4
    assert called([30, 20], 1, 5, _MOST_GROUPED + 4) == [plain] * 2 + [masked] * 3


@pytest.mark.parametrize("fused", [True, False])
def test_cudnn_is_disabled_for_layers_of_transformers(cuda, fused, monkeypatch):
    """Guards against its plans where layers pick their own attention, and against a switch for the whole
    process where none do.
    """
    calls = []
    monkeypatch.setattr("torch.backends.cuda.enable_cudnn_sdp", calls.append)
    FusedRunner(cuda(fused=fused, num_layers=1))
    assert calls == [False] * (not fused)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_same_ids_by_flash_attention(groups, monkeypatch):
    """Guards against heads in another order, and against a mask that is missing or aligned otherwise."""
    model = own_llama(
        fused=True, num_attention_heads=2 * groups, hidden_size=48, max_position_embeddings=2048
    )
    drafts = {"exit_layer": 2, "num_speculations": 5, "max_steps": 12}
    prompts = [PROMPT, [5 + i % 40 for i in range(PREFILL_CHUNK + 37)]]
    monkeypatch.setattr("self_speculation.scheduler.make_runner", FusedRunner)
    expected = [ids_of(model, prompt, **drafts) for prompt in prompts]
    lengths = []

    def attention(query, key, value, _, is_causal, scale):
        """What the kernel computes: the last token sees all keys."""
        lengths.append((query.shape[2], key.shape[2]))
        mask = torch.ones(lengths[-1], dtype=torch.bool)
        mask = mask.tril(key.shape[2] - query.shape[2]) if is_causal else mask
        return (scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True),)

    flash = AttentionKernel.FLASH
    monkeypatch.setattr("self_speculation.passes.attention_context.attention_kernel", lambda *_: flash)
    monkeypatch.setattr("self_speculation.passes.attention.flash_attention", attention)
    assert [ids_of(model, prompt, **drafts) for prompt in prompts] == expected
    assert {(6, 6), (PREFILL_CHUNK, PREFILL_CHUNK), (37, PREFILL_CHUNK + 37)} < {*lengths}
    assert any(width == 6 and length > 6 for width, length in lengths)  # verifications


# Norm, qkv, attention (three kernels), output, norm, gate and up, gated, down.
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("lengths", "width"), [([30], 1), ([30], 5), ([30, 20, 7], 1), ([30, 20, 7], 30)])
def test_work_of_a_layer_by_our_kernels(cuda, lengths, width):
    """Guards against masks, copies and another kernel for each layer, also where rows differ in length."""
    runner, ran = FusedRunner(cuda(head_dim=64)), []
    assert runner.why_no_kernels is None
    with torch.inference_mode(), Waits():
        cache = rows_of(runner, lengths, 2)
        for depth in (1, 2):
            cache.set_rows(lengths)
            with Kernels() as counts:
                ids = torch.zeros(len(lengths), width, dtype=torch.long, device=DEVICE)
                forward_early(runner, cache, ids, depth)
            ran.append(counts)
    one, two = ran
    found = len(two.kernels) - len(one.kernels)
    assert (found, len(two.calls) - len(one.calls)) == (8, 8)
    assert found + 2 == estimates.KERNELS


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("captured", [False, True])
def test_work_of_a_round(cuda, captured, monkeypatch):
    """8 layers, exit 2, 6 tokens drafted: 7 passes of 2 layers, and one of 6. Guards against calls of the
    host that a replay does not save.
    """
    replays = []
    monkeypatch.setattr(captured_runner, "GraphRecorder", lambda _: lambda run: lambda: replays.append(run))
    model = cuda((4, 4), num_layers=8, head_dim=64)
    if captured:
        runners.capture_decoding(model)
    scheduler = scheduler_of(model, 1, max_steps=40, exit_layer=2, num_speculations=6)
    scheduler.add_request(0, Request([5] * 30))
    scheduler.step()
    replays.clear()
    with Kernels() as ran:
        scheduler.step()
    assert len(ran.calls) < 200 or not captured
    assert not {"item", "_local_scalar_dense", "equal", "nonzero"} & {*ran.calls}
    assert ran.copied < model.model.layers[0].self_attn.o_proj.weight.numel()
    assert len(replays) == 8 * captured


def test_a_read_waits_for_the_gpu_that_copies(monkeypatch):
    """Guards against an event of the current GPU, which is over before another one has copied anything."""
    recorded, empty = [], torch.empty
    event = type("Event", (), {"record": lambda event, stream=None: recorded.append(stream)})
    monkeypatch.setattr("torch.cuda.Event", lambda enable_timing: event())
    monkeypatch.setattr("torch.cuda.current_stream", lambda device=None: device)
    monkeypatch.setattr("torch.empty", lambda *size, pin_memory=False, **kind: empty(*size, **kind))
    with FakeTensorMode() as mode:
        AsyncRead([FakeTensor(mode, empty(3, device="meta"), torch.device("cuda:1"))])
    assert recorded == [torch.device("cuda:1")]


def test_a_model_loaded_on_a_gpu(model_folder, monkeypatch):
    """Guards against work that goes to the first GPU instead."""
    chosen, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr("self_speculation.loading.loading.resolve_device", torch.device)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, device_map, **kwargs: load(*args, **kwargs)
    )
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    load_model_and_tokenizer(str(model_folder), LoadingOptions(device="cuda:1"))
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_gpu_that_torch_does_not_see(monkeypatch):
    """Guards against hours on a CPU because of an old driver, unnoticed."""
    monkeypatch.setattr("os.path.exists", "/proc/driver/nvidia".__eq__)
    with pytest.warns(UserWarning, match="does not see this machine's NVIDIA GPU .* driver 580"):
        resolve_device("auto")


@pytest.mark.parametrize("top_k", [0, 20])
def test_what_sampling_sorts(top_k):
    """Guards against a vocabulary that is searched before it is sorted, and against a read: a GPU does not
    look whether the most likely ids are enough.
    """
    with FakeTensorMode(), OnMeta(), Waits(), Kernels() as ran:
        keys = torch.zeros(1, dtype=torch.long, device=DEVICE)
        Sampler(top_k=top_k, top_p=0.9)(torch.empty(1, 1000, device=DEVICE), keys)
    assert [name for name in ran.kernels if name in ("sort", "topk")] == ["sort"]
