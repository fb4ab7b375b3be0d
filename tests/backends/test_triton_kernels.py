"""The kernels of a card: by Triton's interpreter, by Triton's compiler, and in whole answers.

Without triton the tests are skipped. The interpreter's products of bfloat16 are wrong, so what
it computes is float16 and float32.
"""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import card_kernels
import cuda_graphs
import pytest
import torch
from conftest import ADAPTIVE, HAS_TRITON, ROOT, TRITON, card_llama, ids_of, in_batch, random_plans
from test_llama_model_utils import WINDOW, family

from self_speculation import Request
from self_speculation.backends.card_runner import FusedRunner
from self_speculation.backends.runners import capture_decoding, fuse

TYPES = ["sliding_attention", "full_attention"]
DEFAULT = [("llama", False, "layers"), ("llama", True, "layers"), ("windows", True, "layers")]


@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(n, marks=pytest.mark.slow) for n in range(8, 100))]
)
def test_kernels_compute_attention(seed, interpreter, monkeypatch):
    """Guards against keys of another row, head, split or window, positions that are off by one, lost norms,
    padding that is written, and reads of what no row has written, which is NaN here. So are positions that a
    row reads in another slot, together with other rows. Rows share more of them, fewer, or none.
    """
    draws = random.Random(seed)
    num_processors = draws.choice([1, 16, 64])
    monkeypatch.setattr(interpreter, "_processors", lambda device: num_processors)
    torch.manual_seed(seed)
    width = draws.choice([1, 1, 2, 5, 17])
    size = draws.choice([64, 96, 128, 256])
    rows = draws.randint(1, max(1, min(4, 16 // width)))
    capacity = 320
    kv_heads = draws.randint(1, 2)
    group = draws.choice([1, 2, 4, 7])
    dtype = draws.choice([torch.float16, torch.float32])
    heads = kv_heads * group
    window = draws.choice([None, None, 3, 100])
    lengths = [draws.choice([0, 1, 63, 64, 130, capacity - width]) for _ in range(rows)]
    keys, values = (
        torch.full((rows + 1, kv_heads, capacity, size), torch.nan, dtype=dtype) for _ in range(2)
    )
    prefix_reads = torch.zeros(2 + rows, dtype=torch.long)
    if rows > 1 and draws.random() < 0.7:
        prefix_reads[0] = draws.randrange(rows)
        for row, length in enumerate(lengths):
            prefix_reads[1 + row] = draws.choice([0, length // 64 * 64, length // 128 * 64])
        lengths[prefix_reads[0]] = max(lengths)
    for buffer in (keys, values):
        for row, length in enumerate(lengths):
            first = int(prefix_reads[1 + row]) if row != prefix_reads[0] else 0
            buffer[row, :, first:length] = torch.randn(kv_heads, length - first, size)
    angles = torch.arange(capacity)[:, None] * 1e4 ** -(torch.arange(size // 2) / (size // 2))
    cos, sin = (torch.cat((table, table), 1).to(dtype) for table in (angles.cos(), angles.sin()))
    positions = torch.tensor(lengths)[:, None] + torch.arange(width)
    positions[:, width - draws.randint(0, width - 1) :] = -1  # as in captured passes
    if draws.random() < 0.3:
        positions[draws.randrange(rows)] = -(1 << 30)
    qkv = torch.randn(rows * width, (heads + 2 * kv_heads) * size).to(dtype)
    norms = (torch.rand(size).to(dtype), torch.rand(size).to(dtype)) if draws.random() < 0.5 else None
    is_centred = draws.choice([True, False])
    scale = size**-0.5
    right = keys.clone(), values.clone()
    given = (*(norms or (None, None)), 1e-5, is_centred, cos, sin)
    rest = (positions, prefix_reads, scale, window)
    want = card_kernels.decode_attention(qkv.clone(), *given, *right, *rest).float()
    found = torch.ops.self_speculation.decode_attention(qkv, *given, keys, values, *rest)
    roundings = {torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(
        found.float(), want, rtol=0, atol=roundings * max(1.0, float(want.abs().max()))
    )
    for written, expected in zip((keys, values), right, strict=True):
        assert torch.equal(written.isnan(), expected.isnan())
        torch.testing.assert_close(written, expected, rtol=0, atol=4 * roundings, equal_nan=True)


# Card, tokens, heads, heads of keys, size of a head, rows: those of 7B, 8B, 1B, Gemma and Phi.
MODELS = {
    "7B": (32, 32, 128), "8B": (32, 8, 128), "1B": (32, 8, 64), "gemma": (4, 1, 256), "phi": (32, 32, 96),
}  # fmt: skip
FEW = [(90, 1, "7B", 1), (80, 8, "8B", 1), (86, 64, "1B", 1), (89, 8, "gemma", 1)]
MANY = itertools.product((80, 86, 89, 90), (1, 4, 64), MODELS, (1, 8))
SHARED = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB that a program may have


@pytest.mark.parametrize("cases", [FEW, pytest.param([*MANY], marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_kernels_assemble(cases):
    """Guards against what only the compiler refuses, registers that spill, more shared memory than a card
    has, and processors without work where one row decodes.
    """
    given = [",".join(map(str, (card, n, *MODELS[name], rows))) for card, n, name, rows in cases]
    paths = os.pathsep.join([str(ROOT), str(TRITON), *sys.path])
    env = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    program = Path(__file__).parent / "assembly.py"
    command = [sys.executable, program, *given]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    kernels = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(kernels) == 4 * len(cases)
    for kernel in kernels:
        card, width, _, _, size, rows = map(int, kernel["case"].split(","))
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["shared"] <= SHARED[card] * 1024, kernel
        has_many = kernel["kernel"] == "attend" and size != 256 and (width, rows) == (1, 1)
        assert kernel["programs"] >= 100 or not has_many, kernel


@pytest.mark.usefixtures("interpreter")
def test_gates():
    """Guards against gates and what they gate in the wrong order, and against another activation."""
    joint = torch.randn(3, 2 * 1500)
    for is_gelu in (False, True):
        found = torch.ops.self_speculation.gated(joint, is_gelu)
        torch.testing.assert_close(found, card_kernels.gated(joint, is_gelu))


@pytest.mark.parametrize(
    ("kind", "is_captured", "way"),
    [
        pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow)
        for case in itertools.product(("llama", "windows"), (False, True), ("plain", "layers", "adaptive"))
    ],
)
def test_whole_answers(kind, is_captured, way, interpreter, monkeypatch):  # noqa: ARG001
    """Three rows of different lengths. Guards against kernels that a runner hands other rows, layers,
    windows, positions or buffers than the layer has: ids are those of a CPU.
    """
    model = card_llama()
    if kind == "windows":  # in every second layer
        shape = {"num_hidden_layers": 2, "head_dim": 64, "sliding_window": WINDOW, "layer_types": TYPES}
        model = family("gemma3_text", **shape).float()
        fuse(model)
    requests = [Request([5, 9, 4, *(3 + 7 * i % 40 for i in range(length))]) for length in (2, 71, 3)]
    want = [ids_of(model, request.prompt, max_steps=5) for request in requests]
    if is_captured:
        graphs = cuda_graphs.stand_in(monkeypatch)
        capture_decoding(model)
    else:
        monkeypatch.setattr("self_speculation.engine.scheduler.make_runner", FusedRunner)
    drafts = {"adaptive": ADAPTIVE, "layers": {"exit_layer": 1, "num_speculations": 2}, "plain": {}}[way]
    with random_plans(0):
        found = in_batch(model, requests, 3, max_steps=5, **drafts)
    assert [found[row].predicted_tokens for row in range(3)] == want
    assert not is_captured or graphs.replayed
