r"""Make a Llama of random weights whose early exits agree with it as often as you like, and a tokenizer.

    python benchmarks/make_synthetic_model.py --folder models/synthetic
    python benchmarks/make_synthetic_model.py --num_layers 30 --hidden_size 576 --intermediate_size 1536 \
        --vocab_size 8192 --exit_layer 8 --scale 0.03      # the one in the README's table

Scaling the output projections of the layers from --exit_layer on makes these layers change little: a model on
which self-speculation pays, without training. Its text means nothing; its speed is that of its shape.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import parse, refuse
from measures.synthetic import scale_down


@dataclass(frozen=True)
class SyntheticArguments:
    """Shape of the model."""

    folder: str = "models/synthetic"
    """Where to save it."""
    num_layers: int = 16
    """Decoder layers."""
    hidden_size: int = 384
    """Width, a multiple of 64."""
    intermediate_size: int = 1024
    """Width of the MLP."""
    num_kv_heads: int = 3
    """Heads of keys and values; of queries there is one for each 64 of the width."""
    vocab_size: int = 4096
    """Tokens of the byte-level BPE, trained on the standard library's sources."""
    exit_layer: int = 4
    """Layers from here on are scaled down."""
    scale: float = 0.06
    """By this; smaller: the early exit agrees more often."""
    seed: int = 0
    """Of the weights."""


def main() -> None:
    (args,) = parse(__doc__ or "", SyntheticArguments)
    heads = args.hidden_size // 64
    if not args.num_kv_heads or heads % args.num_kv_heads:
        refuse(f"--num_kv_heads {args.num_kv_heads}: must divide {heads}, the heads of queries")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_sources(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.hidden_size, intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers, num_attention_heads=heads, num_key_value_heads=args.num_kv_heads,
        max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, initializer_range=0.05,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    scale_down(model, args.exit_layer, args.scale)
    model.save_pretrained(args.folder)
    wrapped.save_pretrained(args.folder)
    print(f"{args.folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")


def _sources() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    main()
