"""Times products of copies in four bits beside the time to read them.

    python benchmarks/products.py

All products of the layers of Qwen2.5-Coder-0.5B, over random weights. Our own kernel and torch's alternate
in one process, each weight is cold, and memory's limit is the sum of a large tensor.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from self_speculation.model import int4_linear
from self_speculation.model.int4_linear import Int4Linear
from self_speculation.model.kernels import Int4Kernel, int4_kernel

# [out, in] of one layer: q with k and v, o, gate with up, down.
SHAPES = ((1152, 896), (896, 896), (9728, 896), (896, 4864))
TOKENS = (1, 2, 4, 8, 16, 32, 64)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15, help="timed passes over all products")
    args = parser.parse_args(argv)
    kernel, threads = int4_kernel(), torch.get_num_threads()
    print(f"{kernel}, {threads} threads, torch {torch.__version__}, {args.layers} layers")
    weights = [torch.randn(shape) * 0.02 for _ in range(args.layers) for shape in SHAPES]
    copies = {str(kernel): made(str(kernel), weights)}
    if kernel.variant is not None:
        vars(int4_linear)["int4_kernel"] = lambda: Int4Kernel(None)
        copies["torch's kernel"] = made("torch's kernel", weights)
    num_bytes = sum(linear.num_bytes for linear in next(iter(copies.values())))
    large = torch.ones(2**27)  # 512 MiB
    print(
        f"\n{'ms for all products, median (least)':<36} {'tokens':>8} " + " ".join(f"{n:>15}" for n in TOKENS)
    )
    times: dict[tuple[str, int], list[float]] = {}
    for num_tokens in TOKENS:
        inputs = {width: torch.randn(num_tokens, width) for _, width in SHAPES}
        for _ in range(args.rounds):
            reading = timed(large.sum) * num_bytes / large.nbytes
            times.setdefault(("memory's limit", num_tokens), []).append(reading)
            for name, linears in copies.items():
                took = timed(partial(products, linears, inputs))
                times.setdefault((name, num_tokens), []).append(took)
    for name in ("memory's limit", *copies):
        cells = (times[name, num_tokens] for num_tokens in TOKENS)
        print(f"{name:<45} " + " ".join(f"{median(cell):8.2f} ({min(cell):.2f})".rjust(15) for cell in cells))
    print("over memory's limit, median of paired ratios")
    for name in copies:
        pairs = (zip(times[name, n], times["memory's limit", n], strict=True) for n in TOKENS)
        ratios = (median(took / limit for took, limit in pair) for pair in pairs)
        print(f"{name:<45} " + " ".join(f"{ratio:15.2f}" for ratio in ratios))


@torch.inference_mode()
def made(name: str, weights: list[Tensor]) -> list[Int4Linear]:
    """Copies, made one after the other. `quantized` makes as many at a time as there are threads."""
    start = time.perf_counter()
    copies = [Int4Linear(weight) for weight in weights]
    seconds = time.perf_counter() - start
    print(f"{name}: copies made in {seconds / sum(map(Tensor.numel, weights)) * 1e9:.1f} ns a weight")
    return copies


@torch.inference_mode()
def products(linears: list[Int4Linear], inputs: dict[int, Tensor]) -> None:
    for linear, (_, width) in zip(linears, SHAPES * (len(linears) // len(SHAPES)), strict=True):
        linear.matmul_bf16(inputs[width])


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
