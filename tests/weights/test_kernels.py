"""Our operators: products in four bits, rounding, and places where they cannot be built."""

import platform
import shutil
import stat
import warnings
from pathlib import Path
from threading import Thread

import forks
import pytest
import torch
from conftest import needs_operators

from self_speculation.config import LoadingWarning
from self_speculation.weights import kernels
from self_speculation.weights.int4_linear import _shares, in_four_bits
from self_speculation.weights.kernels import CPUOperators, cpu_operators

SHAPES = [(16, 32), (64, 96), (50, 48), (17, 33), (2128, 100), (40, 576)]


def unpacked(weight, shape):
    """The kernel's layout -> steps [rows, groups, 32] from 0 to 15, sizes and middles [groups, rows]."""
    blocks, groups = -(-shape[0] // 16), -(-shape[1] // 32)
    scales, steps = weight[64:].view(blocks, groups, 320).split((64, 256), 2)
    steps = steps.reshape(blocks, groups, 4, 64)
    halves = torch.stack((steps & 15, steps >> 4), 3)  # [blocks, groups, 4, half, 4 rows + byte]
    steps = (
        halves.view(blocks, groups, 4, 2, 16, 4).permute(0, 4, 1, 2, 3, 5).reshape(blocks * 16, groups, 32)
    )
    scales = scales.contiguous().view(torch.bfloat16).view(blocks, groups, 2, 16)
    return steps, *scales.float().permute(2, 1, 0, 3).flatten(2)


def product(x, weight, shape):
    """Of inputs rounded to eight bits by groups, in the kernel's order of sums; products and sums are rounded
    as by fused multiply-add.
    """
    steps, sizes, middles = unpacked(weight, shape)
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    largest = groups.abs().amax(2, keepdim=True)
    rounded = (groups * torch.where(largest > 1e-30, 127 / largest, 0.0)).round()
    size = (largest / 127).squeeze(2)  # [T, groups]
    inputs = size * rounded.sum(2)
    total = torch.einsum("tgj,ngj->gtn", rounded.double(), steps.double())
    outputs = torch.zeros(len(x), len(steps))
    for group, (per_step, middle) in enumerate(zip(sizes.double(), middles.double(), strict=True)):
        zero = (middle - 8 * per_step).float().double()
        outputs = (outputs + zero * inputs[:, group, None].double()).float()
        outputs = (outputs + (total[group] * per_step).float().double() * size[:, group, None]).float()
    return outputs


def made(shape):
    torch.manual_seed(0)
    return torch.ops.self_speculation.int4_round(
        torch.randn(shape), _shares(torch.ones(-(-shape[1] // 32) * 32)).flatten()
    )


def multiplied(x, weight, shape):
    """By all rows, with those of the padding."""
    rows = -(-shape[0] // 16) * 16
    return torch.ops.self_speculation.project(x, [], 0.0, False, [weight], False, rows)


@needs_operators
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8, 15, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_exact(shape, num_tokens):
    """Guards against rows, columns, tokens or groups in a wrong order, and padding that counts."""
    weight = made(shape)
    x = torch.randn(num_tokens, shape[1])
    got = multiplied(x, weight, shape)
    assert torch.equal(got, product(x, weight, shape))
    # Whatever stands beside a token, and however many threads there are.
    alone = [multiplied(row[None], weight, shape) for row in x]
    assert torch.equal(got, torch.cat(alone))
    torch.set_num_threads(2)
    try:
        assert torch.equal(got, multiplied(x, weight, shape))
    finally:
        torch.set_num_threads(1)


@needs_operators
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan, 0.0, 3e38, 1e-42])
@pytest.mark.parametrize("at", [0, 35])
def test_a_token_is_its_own(number, at):
    """Guards against an infinity, NaN or tiny number of one token in the products of others."""
    shape = (48, 40)
    weight = made(shape)
    x = torch.randn(9, 40)
    before = multiplied(x, weight, shape)
    x[4] = 0.0
    x[4, at] = number
    after = multiplied(x, weight, shape)
    others = [row for row in range(9) if row != 4]
    assert torch.equal(before[others], after[others])
    if number == 3e38:
        assert after[4].abs().max() > 1e37
    else:
        assert (after[4].isnan() if abs(number) > 1 or number != number else after[4] == 0).all()


PROGRAM = """
import sys, torch
from self_speculation.weights.kernels import cpu_operators
operators, (weight, counts, x) = cpu_operators(), torch.load(sys.argv[1])
packed = torch.ops.self_speculation.int4_round(weight, counts)
product = torch.ops.self_speculation.project(x, [], 0.0, False, [packed], False, len(weight))
torch.save((operators, packed, product), sys.argv[1])
"""


@needs_operators
def test_all_variants_give_the_same(tmp_path):
    """Guards against a kernel for older processors that nobody runs here: it rounds and multiplies alike."""
    torch.manual_seed(0)
    weight, x, file = torch.randn(50, 100), 100 * torch.randn(15, 100), tmp_path / "numbers"
    counts = _shares(torch.ones(128)).flatten()
    torch.save((weight, counts, x), file)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = forks.run(program, file, env={"ATEN_CPU_CAPABILITY": "avx2"})
    assert result.returncode == 0, result.stderr
    kernel, *got = torch.load(file, weights_only=False)
    assert kernel == CPUOperators("AVX2")
    packed = torch.ops.self_speculation.int4_round(weight, counts)
    product = torch.ops.self_speculation.project(x, [], 0.0, False, [packed], False, len(weight))
    assert all(map(torch.equal, got, (packed, product)))


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_rounds_as_on_a_gpu(shape, dtype):
    """Guards against another rounding than that of `in_four_bits`. Sums in another order decide ties, also of
    scales between two numbers of bfloat16.
    """
    torch.manual_seed(0)
    weight, squares = (torch.randn(shape) + 0.2).to(dtype), torch.rand(-(-shape[1] // 32) * 32) ** 4
    counts = _shares(squares)
    rows = torch.nn.functional.pad(weight, (0, -shape[1] % 32, 0, -shape[0] % 16))
    expected, numbers = in_four_bits(rows, counts)
    steps, *scales = unpacked(torch.ops.self_speculation.int4_round(weight, counts), shape)
    expected = expected.view(steps.shape)
    same = (steps == expected).all(2) & (torch.stack(scales, 2) == numbers).all(2).T
    assert same.float().mean() > 0.98

    def error(steps, scales, middles):
        values = (steps - 8.0) * scales.T[:, :, None] + middles.T[:, :, None]
        return ((values - rows.float().view(steps.shape)).square() * counts).sum()

    assert float(error(steps, *scales)) == pytest.approx(float(error(expected, *numbers.unbind(2))), rel=1e-3)


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """A cache, and a compiler that takes no time; files that were loaded."""
    if (variant := cpu_operators().variant) is None:
        pytest.skip(str(cpu_operators()))
    monkeypatch.setenv("SELF_SPECULATION_CACHE", str(tmp_path / "cache"))
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo built > "$2"')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    loaded = []

    def load(file):
        if file.read_text() != "built\n":
            raise OSError("not a library")
        loaded.append(file)

    monkeypatch.setattr(torch.ops, "load_library", load)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "cache/kernels" / kernels._file_name(variant), compiler, loaded


def load():
    return cpu_operators.__wrapped__()


def test_it_is_built_once(builds):
    """Guards against a compiler at each start, and against files that others can write."""
    file, compiler, loaded = builds
    assert load().variant
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    compiler.unlink()
    assert load().variant
    assert loaded == [file, file]
    file.chmod(0o777)
    assert "compiler, install Debian's package g++" in load().why_not
    file.chmod(0o755)
    file.write_text("cut sho")  # by a disk, say
    assert load().variant is None


def test_the_folder_is_where_the_user_says(monkeypatch):
    """Guards against files outside of the folder that is named, such as a container's volume."""
    for name in ("XDG_CACHE_HOME", "SELF_SPECULATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value, folder in (
        ("HOME", "/home/user", "/home/user/.cache/self-speculation"),
        ("XDG_CACHE_HOME", "/caches", "/caches/self-speculation"),
        ("SELF_SPECULATION_CACHE", "~/kept", "/home/user/kept"),
    ):
        monkeypatch.setenv(name, value)
        assert kernels._kept("AVX2")[0].parent == Path(folder) / "kernels"


def test_another_source_has_another_file(builds, tmp_path, monkeypatch):
    """Guards against a kernel of an earlier version."""
    file, _, loaded = builds
    load()
    (tmp_path / "other.h").write_text("// another one")
    monkeypatch.setattr(kernels, "_SOURCES", (*kernels._SOURCES[:-1], tmp_path / "other.h"))
    load()
    assert loaded[0] == file != loaded[1]


@pytest.mark.parametrize("cache", ["/proc/nowhere", "others"])
def test_a_cache_that_cannot_be_written(builds, cache, monkeypatch, tmp_path):
    """Guards against drafts that are slower for it, a compiler at each start, and against code in a folder
    that others can write; against a user who does not know how to name another folder.
    """
    *_, loaded = builds
    if cache == "others":
        (tmp_path / cache / "kernels").mkdir(parents=True)
        (tmp_path / cache / "kernels").chmod(0o777)
        cache = str(tmp_path / cache)
    monkeypatch.setenv("SELF_SPECULATION_CACHE", cache)
    instead = "they are kept in .*; SELF_SPECULATION_CACHE names another folder$"
    with pytest.warns(LoadingWarning, match=f"cannot be kept in {cache}/kernels: {instead}"):
        assert load().variant
    assert not loaded[0].is_relative_to(cache)
    with warnings.catch_warnings(action="error"), monkeypatch.context() as later:
        later.setenv("CXX", "none")
        assert load().variant
    assert loaded[0] == loaded[1]
    assert stat.S_IMODE(loaded[0].parent.stat().st_mode) == 0o700
    loaded[0].parent.chmod(0o777)
    assert "cannot be built: others can write" in load().why_not


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "compiler, install Debian's package g++"),
        (
            "echo 'x.cpp:1: fatal error: torch/library.h is not there' >&2; exit 1",
            "compiler: x.cpp:1: fatal err",
        ),
        ("exit 3", "compiler: it fails"),
        ('while [ "$1" != -o ]; do shift; done; echo nothing > "$2"', "not a library"),
        ("exit 0", "No such file"),
    ],
)
def test_without_a_compiler(builds, script, why):
    """Guards against an error, or a kernel that is not there, where none can be built."""
    _, compiler, loaded = builds
    if script is None:
        compiler.unlink()
    else:
        compiler.write_text(f"#!/bin/sh\n{script}")
    kernel = load()
    assert kernel.variant is None
    assert why in kernel.why_not
    assert str(kernel).startswith("torch (")
    assert not loaded


def test_two_processes_build_at_once(builds):
    """Guards against a file that one process writes while another one loads it."""
    file, compiler, loaded = builds
    compiler.write_text(compiler.read_text().replace("echo built", "echo buil > $2; sleep 0.05; echo built"))
    threads = [Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [file] * 3


def test_other_processors_have_none(monkeypatch):
    """Guards against instructions that a processor does not have."""
    both = {"avx512_vnni", "avx512_bf16"}
    for level, has, variant in (
        ("AVX512", both, "AVX512_BF16"), ("AVX512", {"avx512_vnni"}, "AVX512_VNNI"),
        ("AVX512", {"avx512_bf16"}, "AVX2"), ("AVX2", both, "AVX2"), ("DEFAULT", both, None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda level=level: level)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: dict.fromkeys(has, True))
        assert kernels._best_variant() == variant
    assert "none for this processor" in load().why_not


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_an_image_has_all_variants(tmp_path):
    """Guards against an image whose kernel is that of the machine which built it."""
    kernels.build_into(tmp_path)
    names = {"ARM"} if platform.machine() == "aarch64" else kernels.VARIANTS.keys() - {"ARM"}
    assert {file.name for file in tmp_path.iterdir()} == {*map(kernels._file_name, names)}
