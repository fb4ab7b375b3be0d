"""Save a Llama with the shape of a real one and random weights, to time passes without a checkpoint.

    python benchmarks/synthetic.py --shape Llama-3.2-1B --folder logs/random

Its early exit agrees with it about as often as exits of the published LayerSkip checkpoints do. (Llama-3.2-1B
ties head and embedding; here they are two.) The tokenizer is the bundled model's.
"""

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import check, parse
from runs.failures import check_writable
from runs.program import run
from self_speculation.backends.full_forward import hidden_after_each_layer
from self_speculation.config import default_model
from self_speculation.loading.loading import resolve_device

# Standard deviation of the logits: as peaked as a trained model, so sampled drafts are accepted about
# as often as greedy ones.
_LOGIT_SPREAD = 6.0
# Standard deviation of the embeddings. A smaller one makes outputs repeat a few tokens, since the next token
# hardly depends on the last one.
_EMBEDDING_SPREAD = 4.0
_AGREEMENT = 0.9  # of exit and model; then 70 % of 6 drafted tokens are accepted
_POSITIONS = 512  # that are compared
_HALVINGS = 12  # steps of the bisection


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


@dataclass(frozen=True)
class SyntheticArguments:
    """Which model, and where to."""

    shape: str = "Llama-2-7B"
    """Llama-2-7B, Llama-3.2-1B, Llama-3-8B or Llama-3-70B."""
    folder: str = "logs/random"
    """A folder for the model."""
    seed: int = 0
    """Of the weights."""

    def __post_init__(self) -> None:
        check(self, "shape", self.shape in MODELS, f"must be one of {', '.join(MODELS)}")


def main(argv: Sequence[str] | None = None) -> int:
    (args,) = parse(__doc__ or "", SyntheticArguments, args=argv)
    check_writable("folder", args.folder)
    config = copy.deepcopy(MODELS[args.shape])
    config.tie_word_embeddings = False
    exit_layer = config.num_hidden_layers // 4
    model, agreement = random_llama(config, exit_layer, _AGREEMENT, resolve_device(), args.seed)
    for saved in (model, AutoTokenizer.from_pretrained(default_model())):
        saved.save_pretrained(Path(args.folder).expanduser())
    print(f"{args.folder}: {args.shape}, its exit {exit_layer} agrees at {agreement:.0%} of positions")
    return 0


@torch.no_grad()
def random_llama(
    config: LlamaConfig, exit_layer: int, agreement: float, device: torch.device, seed: int = 0
) -> tuple[PreTrainedModel, float]:
    """A bf16 model, made on the device, and the rate at which the exit picks the model's token."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=_LOGIT_SPREAD / config.hidden_size**0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=_EMBEDDING_SPREAD)
    ids = torch.randint(config.vocab_size, (1, _POSITIONS), device=device)
    low = 1e-4
    high = 1e3
    scale = 1.0
    for _ in range(_HALVINGS):
        wanted = math.sqrt(low * high)
        for layer in model.base_model.layers[exit_layer:]:
            layer.self_attn.o_proj.weight.data *= wanted / scale
            layer.mlp.down_proj.weight.data *= wanted / scale
        scale = wanted
        is_low = (found := _agreement(model, exit_layer, ids)) < agreement
        low, high = (low, scale) if is_low else (scale, high)
    return model, found


def _agreement(model: PreTrainedModel, exit_layer: int, ids: torch.Tensor) -> float:
    head = model.get_output_embeddings()
    norm = model.base_model.norm
    picked = [
        head(norm(hidden)).argmax(-1)
        for number, hidden in enumerate(hidden_after_each_layer(model, ids), 1)
        if number in (exit_layer, model.config.num_hidden_layers)
    ]
    return float((picked[0] == picked[1]).float().mean())


if __name__ == "__main__":
    run(main)
