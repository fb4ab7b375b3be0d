"""The operators on other processors: without vector instructions, with vectors of 16 numbers, on ARM
(emulated), and under sanitizers.
"""

import shutil
import struct
import subprocess
from fractions import Fraction
from functools import cache

import pytest
import torch
from conftest import ROOT

from self_speculation.weights import kernels

FLAGS = {
    "AVX2": ["c++", *kernels.VARIANTS["AVX2"]],
    "AVX512_BF16": ["c++", *kernels.VARIANTS["AVX512_BF16"]],
    "no vectors": ["c++"],
    "16 numbers": ["c++", "-DWIDE"],
    "ARM": ["aarch64-linux-gnu-g++", "-static", *kernels.VARIANTS["ARM"]],
    "sanitizers": ["c++", *kernels.VARIANTS["AVX2"], "-O1", "-g", "-fsanitize=address,undefined"],
}


def run(name, program):
    compiler, *flags = FLAGS[name]
    if not shutil.which(compiler) or (name == "ARM" and not shutil.which("qemu-aarch64")):
        pytest.skip(f"no {compiler}, or no qemu-aarch64")
    if name == "AVX512_BF16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("a processor without")
    headers = [ROOT / "self_speculation/weights/cpp", kernels._TORCH / "include"]
    command = [
        compiler,
        "-O2",
        "-std=c++20",
        "-ffp-contract=off",
        *flags,
        ROOT / "tests/weights/operators.cpp",
    ]
    subprocess.run([*command, "-o", program, *(f"-I{folder}" for folder in headers)], check=True)
    emulator = ["qemu-aarch64"] if name == "ARM" else []
    result = subprocess.run([*emulator, program], capture_output=True, text=True, check=True)
    assert not result.stderr
    return [line.split() for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """By the name of flags, what operators.cpp prints: kinds and numbers. Each is compiled once."""
    return cache(lambda name: run(name, tmp_path_factory.mktemp("built") / "program"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FLAGS if name != "AVX2"])
def test_other_processors_compute_the_same(name, printed):
    """Guards against code that only runs where nobody develops, and against reads out of bounds."""
    expected, found = printed("AVX2"), printed(name)
    assert [kind for kind, _ in found] == [kind for kind, _ in expected]
    assert len(found) > 2000
    numbers = [torch.tensor([float(number) for _, number in each]) for each in (found, expected)]
    torch.testing.assert_close(*numbers, rtol=2e-5, atol=2e-5)


def number(bits):
    """Exactly; subnormal numbers are zeros."""
    return Fraction(struct.unpack("f", struct.pack("I", bits))[0]) if bits & 0x7F800000 else Fraction(0)


def nearest(exact):
    """In float32, ties to even; subnormal numbers become zeros."""
    unit = Fraction(2) ** -200
    while abs(exact) >= unit * 2**24:
        unit *= 2
    rounded = round(exact / unit) * unit
    return rounded if abs(rounded) >= Fraction(2) ** -126 else Fraction(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AVX2", "16 numbers", "AVX512_BF16"])
def test_products_of_pairs_are_those_of_the_instruction(name, printed):
    """Guards against another order, one rounding of both products, and subnormal numbers: Intel's manual has
    an fma of the upper numbers, and then one of the lower ones.
    """
    found = [int(bits) for kind, bits in printed(name) if kind == "pair"]
    assert len(found) == 4 * 8**3
    for a, b, sum_bits, result in zip(*[iter(found)] * 4, strict=True):
        upper = nearest(number(sum_bits) + number(a & 0xFFFF0000) * number(b & 0xFFFF0000))
        assert number(result) == nearest(upper + number(a << 16 & 0xFFFFFFFF) * number(b << 16 & 0xFFFFFFFF))
