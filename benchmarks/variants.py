"""Times passes of a model by two variants of the operators of a CPU, in turns in one process.

    python benchmarks/variants.py --model FILE.gguf --variants AVX2 AVX_VNNI

A pass runs all layers and the head. Ratios are medians over turns, with their middle half. The states and the
logits of both variants are compared bit by bit; status 1 if one differs.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import ModelArguments, at_least, check, parse
from runs.startup import load_generator
from self_speculation import GenerationConfig
from self_speculation.backends.cpu_runner import InPlaceRunner
from self_speculation.weights import kernels
from self_speculation.weights.few_bits import formats_of

_LIBRARY = "self_speculation"


@dataclass
class VariantArguments:
    variants: list[str] = field(default_factory=lambda: ["AVX2", "AVX_VNNI"])
    """Two variants that this processor has."""
    tokens: list[int] = field(default_factory=lambda: [1, 4, 8, 64])
    """Tokens of a pass; 64 are a piece of a prompt."""
    turns: int = 30
    """Passes of each variant and number of tokens."""

    def __post_init__(self) -> None:
        at_least(self, 1, "turns", "tokens")
        are_two = len(self.variants) == len({*self.variants} & {*kernels.VARIANTS}) == 2
        check(self, "variants", are_two, f"must be two of {', '.join(kernels.VARIANTS)}")


def operators_of(variant: str) -> Any:
    """Build and load the operators under another name, since a process has one library of a name."""
    name = f"{_LIBRARY}_{variant}"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        for source in kernels._SOURCES:
            text = source.read_text("utf-8").replace(f"LIBRARY({_LIBRARY},", f"LIBRARY({name},")
            text = text.replace(f"LIBRARY_IMPL({_LIBRARY},", f"LIBRARY_IMPL({name},")
            (Path(folder) / source.name).write_text(text, "utf-8")
        patches.enter_context(patch.object(kernels, "_FOLDER", Path(folder)))
        file = Path(folder) / f"{name}.so"
        kernels._compile(variant, file)
        torch.ops.load_library(file)
    return getattr(torch.ops, name)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, VariantArguments)
    model_args, config, args = parse(__doc__ or "", *groups, args=argv)
    generator = load_generator(model_args, config)
    model = generator.model
    weights = formats_of(model) or str(model.dtype).removeprefix("torch.")
    print(f"{model_args.model_name}, weights in {weights}, {torch.get_num_threads()} threads")
    libraries = {variant: operators_of(variant) for variant in args.variants}
    longest = max(args.tokens)
    ids = torch.randint(0, model.config.vocab_size, (1, longest), generator=torch.Generator().manual_seed(0))
    passes = {}
    for variant, library in libraries.items():
        with patch.object(torch.ops, _LIBRARY, library):
            runner = InPlaceRunner(model)
            passes[variant] = runner, runner.new_cache(longest, longest + 1)
    differ = False
    first, second = args.variants
    print(f"ms of {first}, of {second}, {first} / {second} (middle half)")
    for number in args.tokens:
        times: dict[str, list[float]] = {variant: [] for variant in args.variants}
        logits = {}
        for turn in range(args.turns + 1):
            for variant in args.variants if turn % 2 else args.variants[::-1]:
                runner, cache = passes[variant]
                cache.set_rows([0])
                with patch.object(torch.ops, _LIBRARY, libraries[variant]):
                    began = time.perf_counter()
                    logits[variant] = runner.run(cache, ids[:, :number], num_logits=min(number, 8)).logits
                    times[variant].append(time.perf_counter() - began)
        differ |= not torch.equal(logits[first], logits[second])
        one, two = (numpy.array(times[variant][1:]) * 1e3 for variant in args.variants)
        low, middle, high = numpy.quantile(one / two, (0.25, 0.5, 0.75))
        medians = f"{numpy.median(one):8.2f} {numpy.median(two):8.2f}"
        print(f"{number:>4} tokens {medians} {middle:6.2f} ({low:.2f} to {high:.2f})", flush=True)
    print("logits differ" if differ else "logits are equal in every bit")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
