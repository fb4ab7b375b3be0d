"""What the host takes for a token: of a model so narrow that computing takes no time, as deep as a large one.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --num_layers 80 --rounds 20

On a GPU a token is at best as fast as the host starts its kernels. Here is what that takes, in milliseconds
for each token: `generate` of transformers, autoregressive decoding, and self-speculative decoding of which
all drafts are accepted, in turn. The layers from --exit_layer on change nothing. The last line is one JSON
object.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import parse, refuse
from runs.status import bars_fit_the_output
from self_speculation import GenerationConfig, make_strategy
from self_speculation.model.lean_layers import fuse


@dataclass(frozen=True)
class HostTimeArguments:
    """Depth and drafts."""

    num_layers: int = 32
    """Decoder layers."""
    exit_layer: int = 8
    """Drafts are made by so many of them."""
    num_speculations: int = 6
    """Tokens of a draft."""
    new_tokens: int = 64
    """Tokens of an answer."""
    rounds: int = 15
    """How often, in turn."""


def main() -> None:
    (args,) = parse(__doc__ or "", HostTimeArguments)
    if not 1 <= args.exit_layer < args.num_layers:
        refuse(f"--exit_layer {args.exit_layer}: must be between 1 and {args.num_layers - 1}")
    for name in ("num_speculations", "new_tokens", "rounds"):
        if getattr(args, name) < 1:
            refuse(f"--{name} {getattr(args, name)}: must be at least 1")
    model = narrow_model(args.num_layers, args.exit_layer)
    prompt = list(range(3, 19))
    ids = torch.tensor([prompt], device=model.device)
    ours = GenerationConfig(max_steps=args.new_tokens, sample=False)
    drafts = GenerationConfig(
        args.new_tokens, args.exit_layer, args.num_speculations, "self_speculative", sample=False
    )

    def transformers() -> list[int]:
        answer = model.generate(
            ids, max_new_tokens=args.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return answer[0, len(prompt) :].tolist()

    def decode(config: GenerationConfig) -> Callable[[], list[int]]:
        strategy = make_strategy(config.generation_strategy)
        return lambda: strategy.generate_token_ids(model, prompt, [], config).predicted_tokens

    ways = {
        "transformers": transformers,
        "autoregressive": decode(ours),
        "self_speculative": decode(drafts),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {name: way() for name, way in ways.items()}  # warm-up
    drafted = make_strategy("self_speculative").generate_token_ids(model, prompt, [], drafts)
    if len({tuple(answer) for answer in answers.values()}) > 1:
        raise SystemExit("host_time.py: the answers differ, so that the times say nothing")
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for name, way in ways.items():
            started = perf_counter()
            way()  # it ends with a read from the device
            seconds[name].append((perf_counter() - started) / args.new_tokens)
    milliseconds = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    for name, value in milliseconds.items():
        print(f"{name:18}{value:8.2f} ms per token, {1000 * min(seconds[name]):.2f} at best")
    record = {
        "num_layers": args.num_layers, "exit_layer": args.exit_layer,
        "num_speculations": args.num_speculations, "acceptance_rate": drafted.acceptance_rate,
        "milliseconds_per_token": milliseconds,
        "device": str(model.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(record))


def narrow_model(num_layers: int, exit_layer: int) -> LlamaForCausalLM:
    """On the GPU where there is one, in the dtype that it would be used in."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=num_layers,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers[exit_layer:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    fuse(model)
    return model


if __name__ == "__main__":
    bars_fit_the_output()
    main()
