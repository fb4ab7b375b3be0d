"""Other software with the same model, as strategies: `generate` of transformers, and llama.cpp."""

import copy
import importlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import init_empty_weights

from arguments import refuse
from measures import metrics
from measures.timed_runs import TimedSide, measure_all
from self_speculation import (
    GenerationConfig,
    GenerationStrategy,
    GenerationStrategyResult,
    HuggingfaceLlamaGenerator,
    Request,
)
from self_speculation.requests.request import as_list
from self_speculation.requests.results import DraftStats
from self_speculation.weights.few_bits import formats_of

TRANSFORMERS = "transformers"
EARLY_EXIT = "transformers, exit"
LOOKUP = "transformers, lookup"
LLAMA_CPP = "llama.cpp"

# Formats of llama.cpp by their number in `llama_ftype`: the weights as they are, and in fewer bits.
FORMATS = {"F16": 1, "BF16": 32, "Q8_0": 7, "Q4_1": 3, "Q4_0": 2, "Q4_K_M": 15}

_TRIES = 2  # of each format; the first one warms up
# Tokens of a first try, after which formats of less than half the best speed are left: they can take minutes.
_FIRST_TOKENS = 8


def side(
    name: str, generator: HuggingfaceLlamaGenerator, strategy: GenerationStrategy, config: GenerationConfig
) -> TimedSide:
    """A side with the tokenizer and model of the generator; the name is the prefix of the side's fields."""
    return f"{name}: ", HuggingfaceLlamaGenerator(generator.tokenizer, generator.model, strategy), config


class TransformersStrategy(GenerationStrategy):
    """Greedy `generate` of transformers, over batches of prompts in order, padded on the left.

    Args:
        name: TRANSFORMERS; EARLY_EXIT or LOOKUP, which take one prompt at a time.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def generate_batch(
        self, model: Any, requests: Iterable[Request], generation_config: GenerationConfig, batch_size: int
    ) -> Iterator[tuple[int, GenerationStrategyResult | Exception]]:
        left = enumerate(requests)
        while batch := dict(islice(left, batch_size)):
            yield from zip(batch, self._generate(model, [*batch.values()], generation_config), strict=True)

    @torch.inference_mode()
    def _generate(
        self, model: Any, requests: Sequence[Request], config: GenerationConfig
    ) -> list[GenerationStrategyResult]:
        options: dict[str, Any] = {"do_sample": False}
        assistant: dict[str, Any] = {}
        if self._name == LOOKUP:
            options["prompt_lookup_num_tokens"] = config.num_speculations
        elif self._name == EARLY_EXIT:
            options["assistant_early_exit"] = config.exit_layer
            # transformers reads the draft length off the assistant's generation config, which is the model's.
            assistant = {
                "num_assistant_tokens": config.num_speculations,
                "num_assistant_tokens_schedule": "constant",
                "assistant_confidence_threshold": 0.0,
            }
        started = time.perf_counter()
        given = list[tuple[float, int]]()  # time and size; first the prompts
        streamer = SimpleNamespace(
            put=lambda ids: given.append((time.perf_counter(), ids.numel())), end=lambda: None
        )
        width = max(len(request.prompt_ids) for request in requests)
        pads = [[0] * (width - len(request.prompt_ids)) for request in requests]
        rows = [pad + request.prompt_ids for pad, request in zip(pads, requests, strict=True)]
        mask = [pad + [1] * (width - len(pad)) for pad in pads]
        end_ids = as_list(requests[0].eos_token_ids)
        with patch.dict(vars(model.generation_config), assistant):
            output = model.generate(
                torch.tensor(rows, device=model.device), streamer=streamer, pad_token_id=0,
                attention_mask=torch.tensor(mask, device=model.device), max_new_tokens=config.max_steps,
                eos_token_id=end_ids or None, **options,
            )  # fmt: skip
        first_at, num_first = given[1]
        took = time.perf_counter() - first_at
        stats = None
        if self._name != TRANSFORMERS:
            stats = DraftStats()
            for _, number in given[1:]:  # one `put` after each verification
                stats.add(self._name, config.num_speculations, accepted=number - 1, emitted=number)
        size = len(requests)  # prefill times add up, as in our batches
        times = (num_first // size, (first_at - started) / size, took)
        return [_result(row, end_ids, *times, stats) for row in output[:, width:].tolist()]


class LlamaCppStrategy(GenerationStrategy):
    """Greedy decoding by llama-cpp-python with torch's number of threads, one prompt at a time."""

    def __init__(self, library: Any, weights: Path) -> None:
        threads = {name: torch.get_num_threads() for name in ("n_threads", "n_threads_batch")}
        self._engine = library.Llama(str(weights), n_ctx=0, verbose=False, **threads)

    def generate_token_ids(
        self, _: Any, input_ids: list[int], eos_token_ids: Any, generation_config: Any, *__: Any
    ) -> GenerationStrategyResult:
        started = time.perf_counter()
        ids = list[int]()
        first_at = 0.0
        self._engine.reset()
        for token in self._engine.generate(input_ids, temp=0.0, reset=False):
            first_at = first_at or time.perf_counter()
            ids.append(token)
            if token in eos_token_ids or len(ids) == generation_config.max_steps:
                break
        return _result(ids, eos_token_ids, 1, first_at - started, time.perf_counter() - first_at)


def _result(
    ids: list[int],
    end_ids: Sequence[int],
    num_first: int,
    prefill_time: float,
    decode_time: float,
    draft_stats: DraftStats | None = None,
) -> GenerationStrategyResult:
    """Of an output up to the end id, which padding may follow; the prompt's pass gave `num_first` tokens."""
    length = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
    num_tokens = len(ids[: length + 1])
    return GenerationStrategyResult(
        ids[:length],
        end_token_id=ids[length] if length < len(ids) else None,
        num_decode_tokens=num_tokens - num_first,
        prefill_time=prefill_time,
        decode_time=decode_time,
        draft_stats=draft_stats,
    )


def of_transformers(
    generator: HuggingfaceLlamaGenerator, config: GenerationConfig, prompt: list[int], batch_size: int
) -> list[TimedSide]:
    """`generate` of transformers by kind of drafts, each in the fastest format for this prompt."""
    names = [TRANSFORMERS]
    if batch_size == 1 and config.max_steps > 1:  # transformers has no exit after all layers
        early = config.exit_layer < len(generator.model.base_model.layers)
        names += [EARLY_EXIT, LOOKUP] if early else [LOOKUP]
    models = in_each_format(generator.model)

    def in_best_format(name: str) -> TimedSide:
        strategy = TransformersStrategy(name)
        generators = [HuggingfaceLlamaGenerator(generator.tokenizer, model, strategy) for model in models]
        return fastest([(f"{name}: ", other, config) for other in generators], prompt, batch_size)

    return [*map(in_best_format, names)]


def in_each_format(model: Any) -> list[Any]:
    """On a CPU, copies of the model in float32, bfloat16 and float16; on a GPU the model itself."""
    if model.device.type != "cpu":
        return [model]
    return [plain_copy(model, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def plain_copy(model: Any, dtype: torch.dtype) -> Any:
    """A copy in this dtype; weights in few bits are dequantised, as transformers does."""
    if not formats_of(model):
        return copy.deepcopy(model).to(dtype)
    with init_empty_weights(include_buffers=False):
        plain = type(model)._from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain.to(dtype).eval()


def fastest(sides: Sequence[TimedSide], prompt: list[int], batch_size: int) -> TimedSide:
    """The side that answers this prompt fastest, prefill included."""
    requests = {index: Request(prompt) for index in range(batch_size)}

    def speed(side: TimedSide) -> float:
        tries = [measure_all([side], requests, batch_size) for _ in range(_TRIES)]
        return max(metrics.speed(records, side[0])["tokens_per_second"] for records in tries)

    if len(sides) == 1:
        return sides[0]
    short = [speed((*which, replace(config, max_steps=_FIRST_TOKENS))) for *which, config in sides]
    return max((each for each, rate in zip(sides, short, strict=True) if 2 * rate >= max(short)), key=speed)


def find_llama_cpp(model: Path) -> Any:
    """The module of llama-cpp-python; ends the program if it is not installed or cannot read the model."""
    try:
        library = importlib.import_module("llama_cpp")
    except ImportError:
        refuse("--peers llama.cpp: needs the package llama-cpp-python, which is built by a C++ compiler")
    if model.suffix != ".gguf":
        refuse(f"--peers llama.cpp: reads .gguf files alone, and --model is {model.name}")
    return library


def of_llama_cpp(library: Any, model: Path, folder: Path) -> dict[str, GenerationStrategy]:
    """On this file and in each format of FORMATS, which llama.cpp's quantiser writes to `folder`."""
    files = {"llama.cpp, this file": model}
    for name, number in FORMATS.items():
        made = folder / f"{name}.gguf"
        how = library.llama_model_quantize_default_params()
        how.ftype = number
        how.allow_requantize = True
        with _silent():
            failed = library.llama_model_quantize(str(model).encode(), str(made).encode(), how)
        if failed:
            refuse(f"--peers llama.cpp: it cannot write {model.name} as {name}", status=1)
        files[f"llama.cpp {name}"] = made
    return {name: LlamaCppStrategy(library, path) for name, path in files.items()}


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what a library in C writes to standard error in this block."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
