"""Other software that has the same model: transformers in its best format, and llama.cpp."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from arguments import refuse
from measures.sides import Answers, Side, theirs
from self_speculation import GenerationConfig

# Of llama.cpp, by the number that it has in `llama_ftype`: the weights as they are, and in fewer bits.
LLAMA_CPP = {"F16": 1, "BF16": 32, "Q8_0": 7, "Q4_1": 3}
FEWER_BITS = ("Q8_0", "Q4_1")

_TRIES = 2  # of each format


def in_each_format(model: Any) -> list[Any]:
    """On a CPU, copies of the model in float32, bfloat16 and float16; on a GPU the model itself."""
    if model.device.type != "cpu":
        return [model]
    return [copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def fastest(models: Sequence[Any], make: Callable[[Any], Side], prompts: Sequence[list[int]]) -> Any:
    """That of the models by which the side that `make` makes of it answers prompts fastest, the pass over the
    prompts included. All take turns; the first turn warms up, where it is not the faster one.
    """
    speeds = [0.0] * len(models)
    for _ in range(_TRIES if len(models) > 1 else 0):
        for index, model in enumerate(models):
            speeds[index] = max(speeds[index], make(model)(prompts).tokens_per_second)
    return models[speeds.index(max(speeds))]


def in_best_format(
    model: Any, end_ids: Sequence[int], config: GenerationConfig, prompts: Sequence[list[int]]
) -> tuple[Any, str]:
    """The model in the format in which transformers answers this batch fastest, and its name."""
    models = in_each_format(model)
    best = fastest(models, lambda each: theirs(each, end_ids, config, len(prompts)), prompts)
    return best, str(best.dtype).removeprefix("torch.")


def find_llama_cpp(model: Path) -> Any:
    """Its module; or the end of the program, in one line, where there is none or it cannot read the model."""
    try:
        import llama_cpp as library  # type: ignore[import-not-found]
    except ImportError:
        refuse("--peers llama.cpp: needs the package llama-cpp-python, which is built by a C++ compiler")
    if model.suffix != ".gguf":
        refuse(f"--peers llama.cpp: reads .gguf files alone, and --model is {model.name}")
    return library


def llama_cpp(model: Path, name: str, end_ids: Sequence[int], config: GenerationConfig, folder: Path) -> Side:
    """Greedy decoding by llama-cpp-python, one prompt at a time, with as many threads as torch has.

    Args:
        model: the .gguf file that the weights are from.
        name: one of LLAMA_CPP; made of the file by its own quantiser.
        folder: where that goes.
    """
    library = find_llama_cpp(model)
    made, how = folder / f"{name}.gguf", library.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = LLAMA_CPP[name], True
    if library.llama_model_quantize(str(model).encode(), str(made).encode(), how):
        refuse(f"--peers llama.cpp: it cannot write {model.name} as {name}", status=1)
    threads = torch.get_num_threads()
    engine = library.Llama(str(made), n_ctx=0, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompts: Sequence[list[int]]) -> Answers:
        new: list[list[int]] = []
        prefill, began = 0.0, time.perf_counter()
        for prompt in prompts:
            started, ids = time.perf_counter(), list[int]()
            engine.reset()
            for token in engine.generate(prompt, temp=0.0, reset=False):
                if not ids:
                    prefill += time.perf_counter() - started
                ids.append(token)
                if token in end_ids or len(ids) == config.max_steps:
                    break
            new.append(ids)
        return Answers(new, len(new), prefill, time.perf_counter() - began)

    return generate
