"""Memory of a training, and speed of decoding on a GPU, by arithmetic.

python -m benchmarks.estimates        # the tables of docs/training.md and docs/gpu.md
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.synthetic import MODELS
from training import losses

_GIB = 2**30
_BANDWIDTH = 2.7e12  # bytes per second that an H100 reads
# Seconds: a kernel in a graph besides its bytes; the GPU's wait for the host in a round.
_KERNEL, _WAIT = 2.75e-6, 50e-6
_AROUND = 18  # kernels of embedding, norm, head and sampling; the start of a graph counts as some
KERNELS = 10  # of a layer; tests count those of a traced pass
_POSITIONS, _DRAFTED, _GAINED = 1000, 6, 5.2  # tokens before and of a round, nine of ten drafts are right
_FP32, _ADAMW = 4, 8  # bytes of a weight or gradient; of its state in AdamW


class Memory(NamedTuple):
    """Bytes of one rank at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float


def memory(
    config: PretrainedConfig, batch_size: int, length: int, num_exits: int, ranks: int = 1,
    lora_rank: int = 0, checkpointing: bool = True, computed_in: torch.dtype = torch.bfloat16,
) -> Memory:  # fmt: skip
    """The memory of a step with gradient accumulation, in the formats of train.py.

    Args:
        batch_size: samples of `length` tokens per pass and rank.
        num_exits: exits that learn at a step, with the last layer.
        ranks: of FSDP; 1: no sharding.
        lora_rank: --lora_rank; 0: all weights learn.
        checkpointing: --gradient_checkpointing.
        computed_in: float32, or that of --dtype.
    """
    one_layer = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 1})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(one_layer)
    layer = sum(part.numel() for part in model.model.layers[0].parameters())
    outside = sum(part.numel() for part in model.parameters()) - layer  # embedding, head, last norm
    everything = outside + layer * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    narrow, tokens = computed_in.itemsize, batch_size * length

    if lora_rank:
        products = [part for part in model.model.layers[0].modules() if isinstance(part, torch.nn.Linear)]
        pairs = sum(part.in_features + part.out_features for part in products) * config.num_hidden_layers
        learning, frozen = lora_rank * pairs, narrow * everything
    else:
        learning, frozen = everything, 0
    weights = (frozen + _FP32 * learning) / ranks
    if ranks > 1:
        # Gathered: a layer and the next one; what is outside, from the first exit to the last gradient.
        weights += narrow * (2 * layer + outside)
    elif computed_in != torch.float32:
        weights += narrow * learning  # autocast's copies of fp32 weights
    gradients = _FP32 * learning / ranks
    if ranks > 1 and not lora_rank:
        gradients += _FP32 * max(layer, outside)  # of the unit whose gradient is reduced

    stream = narrow if ranks > 1 or lora_rank else _FP32  # the residual stream
    hidden = tokens * config.hidden_size
    # Kept by a layer for its backward pass: two norms in fp32, queries, keys, values and the MLP.
    heads = tokens * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    inside = 4 * hidden * _FP32 + narrow * (6 * hidden + 2 * heads + 4 * tokens * config.intermediate_size)
    layers = config.num_hidden_layers
    activations = (
        (layers * hidden * stream + inside) if checkpointing else layers * (hidden * stream + inside)
    )

    chunk = min(losses.CHUNK, tokens * config.vocab_size) * _FP32
    loss = 3 * chunk + num_exits * hidden * (stream + 2 * _FP32) + (0 if lora_rank else narrow * head)
    return Memory(weights, gradients, _ADAMW * learning / ranks, activations, loss)


class Decoding(NamedTuple):
    """Seconds of greedy passes over one sequence in 16 bits, all captured."""

    plain_step: float
    draft_step: float
    round: float  # of _DRAFTED tokens


def decoding(config: PretrainedConfig, exit_layer: int, kernels: int = KERNELS) -> Decoding:
    """The times on an H100.

    Args:
        kernels: of a layer; 0: bytes alone, without what else takes time.
    """
    heads, width = config.num_attention_heads + config.num_key_value_heads, config.hidden_size
    weights = 2 * width * config.head_dim * heads + 3 * width * config.intermediate_size
    cache = 2 * config.num_key_value_heads * config.head_dim * _POSITIONS
    counted = float(kernels > 0)
    of_layer = 2 * (weights + cache) / _BANDWIDTH + kernels * _KERNEL
    outside = 2 * config.vocab_size * width / _BANDWIDTH + counted * _AROUND * _KERNEL
    plain, draft = (layers * of_layer + outside for layers in (config.num_hidden_layers, exit_layer))
    return Decoding(plain, draft, _DRAFTED * draft + plain + counted * _WAIT)


EXITS = {"Llama-3.2-1B": 4, "Llama-2-7B": 8, "Llama-3-8B": 8}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "fsdp over 8": {"ranks": 8},
    "fsdp over 64": {"ranks": 64},
    "LoRA, rank 16": {"lora_rank": 16},
}


def training_table() -> str:
    lines = [f"| GiB per GPU | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for name, config in MODELS.items():
        row = [sum(memory(config, 1, 2048, 5, **more)) / _GIB for more in WAYS.values()]
        lines.append(f"| {name} | {' | '.join(f'{value:.0f}' for value in row)} |")
    about = "A sample of 2,048 tokens per pass, 5 exits, bfloat16, with `--gradient_checkpointing`."
    return "\n".join([*lines, "", about])


def decoding_table() -> str:
    heads = ["model", "plain step", "draft step, exit", "round of 6", "tokens/s, plain", "self-speculative"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, exit_layer in EXITS.items():
        times = decoding(MODELS[name], exit_layer)
        bytes_alone = decoding(MODELS[name], exit_layer, kernels=0)
        plain, plain_by_bytes = (round(1 / of.plain_step) for of in (times, bytes_alone))
        drafted, drafted_by_bytes = (round(_GAINED / of.round) for of in (times, bytes_alone))
        cells = [
            name,
            f"{1e3 * times.plain_step:.1f} ms",
            f"{1e3 * times.draft_step:.1f} ms, {exit_layer}",
            f"{1e3 * times.round:.1f} ms",
            f"{plain} ({plain_by_bytes})",
            f"{drafted} ({drafted_by_bytes}), {drafted / plain:.1f} x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(training_table(), decoding_table(), sep="\n\n")
