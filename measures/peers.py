"""Other software that has the same model: transformers in its best format, and llama.cpp."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from arguments import refuse
from measures.sides import Answers, Side, theirs
from self_speculation import GenerationConfig

# Of llama.cpp, by the number that it has in `llama_ftype`: the weights as they are, and in fewer bits.
LLAMA_CPP = {"F16": 1, "BF16": 32, "Q8_0": 7, "Q4_1": 3}
FEWER_BITS = ("Q8_0", "Q4_1")


def in_best_format(
    model: Any, end_ids: Sequence[int], config: GenerationConfig, prompts: Sequence[list[int]]
) -> tuple[Any, str]:
    """The model in that format in which transformers decodes it fastest on this CPU, tried on a batch of
    prompts, and its name; on a GPU the model itself.
    """
    if model.device.type != "cpu":
        return model, str(model.dtype).removeprefix("torch.")
    fastest, best = 0.0, model
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        other = copy.deepcopy(model).to(dtype)
        side = theirs(other, end_ids, config, len(prompts))
        side(prompts)  # warms up
        if (speed := side(prompts).decode_tokens_per_second) > fastest:
            fastest, best = speed, other
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
