"""Memory of a training by arithmetic.

python -m benchmarks.estimates        # the table of docs/training.md
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from training import losses

_GIB = 2**30
_FP32, _ADAMW = 4, 8  # bytes of a weight or gradient; of its state in AdamW


class Memory(NamedTuple):
    """Bytes of one rank at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return sum(self)


def memory(
    config: PretrainedConfig, batch_size: int, length: int, num_exits: int, ranks: int = 1,
    lora_rank: int = 0, checkpointing: bool = True, computed_in: torch.dtype = torch.bfloat16,
) -> Memory:  # fmt: skip
    """The memory of a step with gradient accumulation, in the formats of train.py.

    Args:
        batch_size: samples of `length` tokens per pass and rank.
        num_exits: exits that learn at a step, with the last layer.
        ranks: of --parallel fsdp; 1: no sharding.
        lora_rank: --lora_rank; 0: all weights learn.
        checkpointing: --gradient_checkpointing.
        computed_in: float32, or that of --dtype.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = sum(part.numel() for part in model.model.layers[0].parameters())
    everything = sum(part.numel() for part in model.parameters())
    outside = everything - layer * config.num_hidden_layers  # embedding, head, last norm
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


def llama(
    hidden: int, inside: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inside, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )  # fmt: skip


MODELS = {
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256, True),
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000, False),
    "Llama-3-8B": llama(4096, 14336, 32, 32, 8, 128256, False),
    "Llama-3-70B": llama(8192, 28672, 80, 64, 8, 128256, False),
}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "fsdp over 8": {"ranks": 8},
    "fsdp over 64": {"ranks": 64},
    "LoRA, rank 16": {"lora_rank": 16},
}


def main() -> None:
    """Print the table as Markdown."""
    print(f"| GiB per GPU | {' | '.join(WAYS)} |\n|{'---|' * (len(WAYS) + 1)}")
    for name, config in MODELS.items():
        row = [memory(config, 1, 2048, 5, **more).total / _GIB for more in WAYS.values()]
        print(f"| {name} | {' | '.join(f'{value:.0f}' for value in row)} |")
    print("\nA sample of 2,048 tokens per pass, 5 exits, bfloat16, with `--gradient_checkpointing`.")


if __name__ == "__main__":
    main()
