"""Times products by our operators beside the time to read their weights.

    python benchmarks/products.py

All products of the layers of Qwen2.5-Coder-0.5B, over random weights in each format. Formats alternate in one
process, each weight is cold, and memory's limit is the maximum of a large tensor.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from self_speculation.weights.few_bits import apply_linear
from self_speculation.weights.int4_linear import int4_copy
from self_speculation.weights.kernels import cpu_operators

# [out, in] of one layer: q with k and v, o, gate with up, down.
SHAPES = ((1152, 896), (896, 896), (9728, 896), (896, 4864))
TOKENS = (1, 2, 3, 4, 5, 8, 16, 32)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15, help="timed passes over all products")
    args = parser.parse_args(argv)
    operators = cpu_operators()
    threads = torch.get_num_threads()
    if operators.variant is None:
        parser.exit(1, f"{operators}: there is nothing to measure\n")
    print(f"{operators}, {threads} threads, torch {torch.__version__}, {args.layers} layers")
    formats = {name: made(name, args.layers) for name in ("float32", "bfloat16", "float16", "four bits")}
    large = torch.ones(2**26)  # 256 MiB
    print(f"\n{'ms for all products, median':<30}" + "".join(f"{n:>9}" for n in TOKENS))
    times: dict[tuple[str, int], list[float]] = {}
    for num_tokens in TOKENS:
        inputs = {width: torch.randn(num_tokens, width) for _, width in SHAPES}
        for _ in range(args.rounds):
            times.setdefault(("memory", num_tokens), []).append(timed(large.max) / large.nbytes)
            for name, linears in formats.items():
                took = timed(partial(products, linears, inputs))
                times.setdefault((name, num_tokens), []).append(took)
    for name, linears in formats.items():
        print(f"{name:<30}" + "".join(f"{median(times[name, n]):9.2f}" for n in TOKENS))
        num_bytes = sum(each.weight.nbytes for each in linears)
        pairs = (zip(times[name, n], times["memory", n], strict=True) for n in TOKENS)
        ratios = [median(took / (limit * num_bytes) for took, limit in pair) for pair in pairs]
        print(f"{'  over memory`s limit':<30}" + "".join(f"{ratio:9.2f}" for ratio in ratios))


@torch.inference_mode()
def made(name: str, num_layers: int) -> list[Any]:
    linears = []
    for out, width in SHAPES * num_layers:
        module = nn.Linear(width, out, bias=False).requires_grad_(False)
        dtype = torch.float32 if name == "four bits" else getattr(torch, name)
        module = module.to(dtype)
        linears.append(int4_copy(module) if name == "four bits" else module)
    return linears


@torch.inference_mode()
def products(linears: list[Any], inputs: dict[int, Tensor]) -> None:
    for each in linears:
        apply_linear(inputs[each.in_features], each)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
