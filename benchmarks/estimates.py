"""Memory of a training, by arithmetic, and speed of decoding on a GPU, by the kernels of traced rounds.

PYTHONPATH=.venv/triton python -m benchmarks.estimates        # the tables of docs/training.md and docs/gpu.md
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.fake_gpu import Launch, Trace, fake_gpu, fake_model
from benchmarks.synthetic import MODELS
from self_speculation import GenerationConfig, Request, make_strategy
from self_speculation.backends.runners import capture_decoding, fuse
from self_speculation.engine.scheduler import Scheduler
from training import losses

_GIB = 2**30
_BANDWIDTH = 2.7e12  # bytes per second that an H100 reads
# Seconds: a kernel besides the bytes; the start of a graph. The GPU does not wait for the host, which queues
# a round before it reads the one before.
_KERNEL = 2.75e-6
_GRAPH = 11e-6
_POSITIONS = 1000  # tokens before a round
_DRAFTED = 6
_ROWS = 8  # of a batch
# Tokens before a step of sequences that share a prefix, or none.
_SHORT = 64
_LONG = 1500
_SHARED = 1472
_GAINED = 5.2  # tokens of a round in which nine of ten drafts are right
_FP32 = 4  # bytes of a weight or gradient
_ADAMW = 8  # bytes of a weight's state


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
        computed_in: float32, or the format of --dtype.
    """
    one_layer = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 1})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(one_layer)
    layer = sum(part.numel() for part in model.model.layers[0].parameters())
    outside = sum(part.numel() for part in model.parameters()) - layer  # embedding, head, last norm
    everything = outside + layer * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    narrow = computed_in.itemsize
    tokens = batch_size * length

    if lora_rank:
        products = [part for part in model.model.layers[0].modules() if isinstance(part, torch.nn.Linear)]
        pairs = sum(part.in_features + part.out_features for part in products) * config.num_hidden_layers
        learning = lora_rank * pairs
        frozen = narrow * everything
    else:
        learning = everything
        frozen = 0
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
    # Kept by a layer for the backward pass: two norms in fp32, queries, keys, values and the MLP.
    heads = tokens * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    inside = 4 * hidden * _FP32 + narrow * (6 * hidden + 2 * heads + 4 * tokens * config.intermediate_size)
    layers = config.num_hidden_layers
    activations = (
        (layers * hidden * stream + inside) if checkpointing else layers * (hidden * stream + inside)
    )

    chunk = min(losses.CHUNK, tokens * config.vocab_size) * _FP32
    loss = 3 * chunk + num_exits * hidden * (stream + 2 * _FP32) + (0 if lora_rank else narrow * head)
    return Memory(weights, gradients, _ADAMW * learning / ranks, activations, loss)


@cache
def traces(
    name: str, num_rows: int = 1, length: int = _POSITIONS, num_shared: int = 0
) -> Mapping[str, Trace]:
    """What an H100 does in a greedy round of several sequences in 16 bits.

    Args:
        length: tokens before the round, of each.
        num_shared: the first of them, which they share.

    Returns:
        The traces of a plain step and of a round of _DRAFTED tokens, captured, and of such a round if nothing
        is.
    """
    exit_layer = EXITS[name]
    found = dict[str, Trace]()
    ways = {"eager": _DRAFTED, "plain": 0, "round": _DRAFTED}
    with fake_gpu() as gpu:
        gpu.length = length
        gpu.num_shared = num_shared
        model = fake_model(MODELS[name])
        fuse(model)
        for way, drafted in ways.items():
            if way == "plain":
                capture_decoding(model)
            strategy = make_strategy("self_speculative" if drafted else "autoregressive")
            config = GenerationConfig(
                generation_strategy=strategy.name, sample=False,
                exit_layer=exit_layer if drafted else -1, num_speculations=drafted or -1,
            )  # fmt: skip
            scheduler = Scheduler[int](strategy, model, config, num_rows)
            for row in range(num_rows):
                scheduler.add_request(row, Request([5 + row] * length))
            while len(scheduler.batch) < num_rows:
                scheduler.step()
            scheduler.step()  # captures
            gpu.trace = found[way] = Trace()
            scheduler.step()
            gpu.trace = Trace()
    return found


class Decoding(NamedTuple):
    """Seconds on an H100."""

    plain_step: float
    draft_step: float
    round: float  # of _DRAFTED tokens


def decoding(
    name: str, by_bytes: bool = False, num_rows: int = 1, length: int = _POSITIONS, num_shared: int = 0
) -> Decoding:
    """The times of captured passes of so many sequences.

    Args:
        by_bytes: without what else takes time.
        length, num_shared: see `traces`.
    """

    def seconds(launches: Sequence[Launch], graphs: int) -> float:
        all_bytes = sum(launch.num_bytes for launch in launches)
        overheads = len(launches) * _KERNEL + graphs * _GRAPH
        return all_bytes / _BANDWIDTH + (0.0 if by_bytes else overheads)

    traced = traces(name, num_rows, length, num_shared)
    plain = traced["plain"]
    whole = traced["round"]
    first, second = whole.replays[:2]
    return Decoding(
        seconds(plain.launches, len(plain.replays)),
        seconds(whole.launches[first.start : second.start], 1),
        seconds(whole.launches, len(whole.replays)),
    )


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
    rows = [f"| {row} |" for row in (" | ".join(heads), *map(decoding_row, EXITS))]
    rows.insert(1, "|---" * len(heads) + "|")
    return "\n".join(
        [
            *rows,
            "",
            about_launches(next(iter(EXITS))),
            *map(about_batches, EXITS),
            *map(about_prefixes, EXITS),
        ]
    )


def decoding_row(name: str) -> str:
    times = decoding(name)
    by_bytes = decoding(name, by_bytes=True)
    plain, plain_by_bytes = (round(1 / of.plain_step) for of in (times, by_bytes))
    drafted, drafted_by_bytes = (round(_GAINED / of.round) for of in (times, by_bytes))
    cells = [
        name,
        f"{1e3 * times.plain_step:.1f} ms",
        f"{1e3 * times.draft_step:.1f} ms, {EXITS[name]}",
        f"{1e3 * times.round:.1f} ms",
        f"{plain} ({plain_by_bytes})",
        f"{drafted} ({drafted_by_bytes}), {drafted / plain:.1f} x",
    ]
    return " | ".join(cells)


def about_batches(name: str) -> str:
    """Tokens a second of all sequences together."""
    times = decoding(name, num_rows=_ROWS)
    plain = round(_ROWS / times.plain_step)
    drafted = round(_ROWS * _GAINED / times.round)
    return f"{name} with {_ROWS} sequences: {plain} tokens/s, {drafted} self-speculative"


def about_prefixes(name: str) -> str:
    """Speed of sequences with long prompts, over that of short ones."""
    short = decoding(name, num_rows=_ROWS, length=_SHORT).plain_step
    alone = decoding(name, num_rows=_ROWS, length=_LONG).plain_step
    shared = decoding(name, num_rows=_ROWS, length=_LONG, num_shared=_SHARED).plain_step
    return (
        f"{name} with {_ROWS} sequences behind {_LONG} tokens, over behind {_SHORT}: {short / alone:.2f}, "
        f"and {short / shared:.2f} if they share {_SHARED}"
    )


def about_launches(name: str) -> str:
    traced = traces(name)
    plain = traced["plain"]
    replay = plain.launches[plain.replays[0]]
    first, second = [at for at, launch in enumerate(replay) if launch.name == "attend"][:2]
    layer = replay[first:second]
    around = len(plain.launches) - len(replay)
    num_kernels = len(layer)
    micros = 1e6 * sum(launch.num_bytes for launch in layer) / _BANDWIDTH
    calls = round(traced["eager"].num_calls, -1)
    captured = traced["round"].num_calls
    return (
        f"A layer of {name} takes {micros:.0f} µs for its bytes and {1e6 * num_kernels * _KERNEL:.0f} µs for "
        f"its {num_kernels} kernels, and a step\nlaunches {around} beside its graph, the read of results. "
        f"A round is some {calls} calls of the host, {captured} with `--compile True`."
    )


if __name__ == "__main__":
    print(training_table(), decoding_table(), sep="\n\n")
