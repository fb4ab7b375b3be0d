"""What a longer context costs: time of a decoded token against attention's own, and memory against the sum.

    python benchmarks/long_context.py
    python benchmarks/long_context.py --model ID --contexts 512 2048 8128

Autoregressive and greedy, after prompts of random ids. *Attention* is the same attention alone, over keys
and values of every layer. *Peak* is the most memory of the process beyond what it holds with the model
loaded; *cache* is computed: keys and values of all positions. The last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, parse, refuse
from runs.startup import load_generator, model_name
from runs.status import bars_fit_the_output
from self_speculation.model.families import attended_length


@dataclass(frozen=True)
class LongContextArguments:
    """How far to go."""

    contexts: list[int] = field(default_factory=lambda: [128, 256, 512, 704])
    """Tokens of the prompts."""
    new_tokens: int = 33
    """Tokens generated after each, the first of them by the prompt's pass."""
    rounds: int = 3
    """How often, context by context in turn."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Gives a list that holds, at the end, the most MiB that were held in between beyond those before."""
    peak: list[float] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append((torch.cuda.max_memory_allocated(device) - before) / 2**20)
        return
    process, done = psutil.Process(), threading.Event()
    held = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(0.002):
            held.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield peak
    done.set()
    watcher.join()
    peak.append((max(held) - held[0]) / 2**20)


@torch.inference_mode()
def attention_seconds(layers: list[tuple[torch.Tensor, torch.Tensor]], queries: torch.Tensor) -> float:
    started = time.perf_counter()
    for keys, values in layers:
        scaled_dot_product_attention(queries, keys, values)
    if queries.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    model_args, config, args = parse(__doc__ or "", ModelArguments, GenerationConfig, LongContextArguments)
    config = dataclasses.replace(config, sample=False, max_steps=args.new_tokens)
    generator = load_generator(model_args, config)
    model, strategy = generator.model, generator.generation_strategy
    shape, like = model.config, model.get_input_embeddings().weight
    most = attended_length(shape) - args.new_tokens
    if args.new_tokens < 2 or not all(1 <= context <= most for context in args.contexts):
        refuse(f"--contexts {args.contexts}: must be between 1 and {most}, so that --new_tokens fit after it")

    kv_heads, num_layers = shape.num_key_value_heads, shape.num_hidden_layers
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    queries = like.new_ones(1, kv_heads, shape.num_attention_heads // kv_heads, head_dim)
    seen: dict[str, dict[int, list[float]]] = {
        name: {context: [] for context in args.contexts}
        for name in ("prefill", "decode", "attention", "peak")
    }
    strategy.generate_token_ids(model, [0], [], config)  # warm-up
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for context in args.contexts:
            prompt = torch.randint(shape.vocab_size, (context,)).tolist()
            with peak_memory(model.device) as peak:
                result = strategy.generate_token_ids(model, prompt, [], config)
            seen["prefill"][context].append(result.prefill_time)
            seen["decode"][context].append(result.decode_time / result.num_decode_tokens)
            seen["peak"][context] += peak
            layers = [
                (like.new_ones(1, kv_heads, context, head_dim), like.new_ones(1, kv_heads, context, head_dim))
                for _ in range(num_layers)
            ]
            seen["attention"][context] += [attention_seconds(layers, queries) for _ in range(5)]

    per_token = 2 * num_layers * kv_heads * head_dim * like.element_size()
    middle = {
        name: [statistics.median(by_context[context]) for context in args.contexts]
        for name, by_context in seen.items()
    }
    table = pandas.DataFrame(
        {
            "context": args.contexts,
            "prefill s": middle["prefill"],
            "decode ms/token": [1000 * value for value in middle["decode"]],
            "attention ms": [1000 * value for value in middle["attention"]],
            "cache MiB": [per_token * (context + args.new_tokens) / 2**20 for context in args.contexts],
            "peak MiB": middle["peak"],
        }
    )
    for column in ("decode ms/token", "attention ms"):
        table.insert(len(table.columns), f"{column} grown", table[column] - table[column][0])
    print(table.to_string(index=False, float_format="{:.2f}".format))
    record: dict[str, Any] = {
        "model": Path(model_name(model_args)).name,
        "dtype": str(model.dtype),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "weights_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
        "contexts": table.to_dict("records"),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    bars_fit_the_output()
    main()
