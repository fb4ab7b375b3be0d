"""Other software with the same model: transformers in its fastest format, llama.cpp and OpenVINO."""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from accelerate import init_empty_weights

from arguments import refuse
from benchmarks.sides import EARLY_EXIT, LOOKUP, TRANSFORMERS, Answers, Side, theirs
from self_speculation import GenerationConfig
from self_speculation.model.few_bits import formats_of

# Formats of llama.cpp by their number in `llama_ftype`: the weights as they are, and in fewer bits.
LLAMA_CPP = {"F16": 1, "BF16": 32, "Q8_0": 7, "Q4_1": 3, "Q4_0": 2, "Q4_K_M": 15}

_LOOKUP_NGRAM = 3  # tokens that openvino-genai looks up, as in its samples
_TRIES = 2  # of each format; the first one warms up


def of_transformers(
    model: Any, end_ids: Sequence[int], config: GenerationConfig, prompt: list[int], size: int
) -> tuple[dict[str, Side], dict[str, str]]:
    """`generate` of transformers by kind of drafts, in the fastest format for this prompt; these formats."""
    names = [TRANSFORMERS]
    if size == 1:  # transformers has no exit after all layers
        early = config.exit_layer < len(model.base_model.layers)
        names += [EARLY_EXIT, LOOKUP] if early else [LOOKUP]
    models, sides, formats = in_each_format(model), {}, {}
    for name in names:
        make = partial(theirs, name, end_ids=end_ids, config=config, size=size)
        chosen = fastest(models, make, [prompt] * size)
        sides[name], formats[name] = make(chosen), str(chosen.dtype).removeprefix("torch.")
    return sides, formats


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


def fastest(models: Sequence[Any], make: Callable[[Any], Side], prompts: Sequence[list[int]]) -> Any:
    """The model whose side answers the prompts fastest, prefill included."""
    speeds = [0.0] * len(models)
    for _ in range(_TRIES if len(models) > 1 else 0):
        for index, model in enumerate(models):
            speeds[index] = max(speeds[index], make(model)(prompts).tokens_per_second)
    return models[speeds.index(max(speeds))]


class Peer(NamedTuple):
    """Other software that reads .gguf files and is not among the requirements.

    Attributes:
        sides: made of its module, the file, end ids, settings, and a folder for further files.
    """

    module: str
    package: str  # that it needs
    sides: Callable[[Any, Path, Sequence[int], GenerationConfig, Path], dict[str, Side]]


def find_peer(name: str, model: Path) -> Any:
    """The module of one of PEERS; ends the program if it is not installed or cannot read the model."""
    try:
        library = importlib.import_module(PEERS[name].module)
    except ImportError:
        refuse(f"--peers {name}: needs the package {PEERS[name].package}")
    if model.suffix != ".gguf":
        refuse(f"--peers {name}: reads .gguf files alone, and --model is {model.name}")
    return library


def of_llama_cpp(
    library: Any, model: Path, end_ids: Sequence[int], config: GenerationConfig, folder: Path
) -> dict[str, Side]:
    """Greedy decoding by llama-cpp-python of this file and in each format of LLAMA_CPP, one prompt at a time.
    llama.cpp's own quantiser writes these.
    """
    sides = {"llama.cpp, this file": _llama_cpp(library, model, end_ids, config)}
    for name, number in LLAMA_CPP.items():
        made, how = folder / f"{name}.gguf", library.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize = number, True
        if library.llama_model_quantize(str(model).encode(), str(made).encode(), how):
            refuse(f"--peers llama.cpp: it cannot write {model.name} as {name}", status=1)
        sides[f"llama.cpp {name}"] = _llama_cpp(library, made, end_ids, config)
    return sides


def _llama_cpp(library: Any, weights: Path, end_ids: Sequence[int], config: GenerationConfig) -> Side:
    """llama.cpp with torch's number of threads."""
    threads = torch.get_num_threads()
    engine = library.Llama(str(weights), n_ctx=0, n_threads=threads, n_threads_batch=threads, verbose=False)

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


def of_openvino(
    library: Any, model: Path, end_ids: Sequence[int], config: GenerationConfig, _: Path
) -> dict[str, Side]:
    """Greedy decoding of this file by openvino-genai, without drafts and by prompt lookup, one prompt at a
    time.
    """
    return {
        f"openvino{name}": _openvino(library, model, end_ids, config, looks_up)
        for name, looks_up in (("", False), (", lookup", True))
    }


def _openvino(
    library: Any, weights: Path, end_ids: Sequence[int], config: GenerationConfig, looks_up: bool
) -> Side:
    """openvino-genai with torch's number of threads. It keeps nothing of earlier prompts."""
    kept, settings = library.SchedulerConfig(), library.GenerationConfig()
    kept.enable_prefix_caching = False
    lookup = {"prompt_lookup": True} if looks_up else {}
    engine = library.LLMPipeline(
        str(weights), "CPU", scheduler_config=kept, INFERENCE_NUM_THREADS=torch.get_num_threads(), **lookup
    )
    settings.max_new_tokens, settings.do_sample = config.max_steps, False
    settings.stop_token_ids = {*end_ids}
    if looks_up:
        settings.num_assistant_tokens, settings.max_ngram_size = config.num_speculations, _LOOKUP_NGRAM
    openvino = importlib.import_module("openvino")

    def generate(prompts: Sequence[list[int]]) -> Answers:
        new: list[list[int]] = []
        prefill, began = 0.0, time.perf_counter()
        for prompt in prompts:
            done = engine.generate(openvino.Tensor(numpy.array([prompt])), settings)
            prefill += done.perf_metrics.get_ttft().mean / 1000
            new.append(done.tokens[0])
        return Answers(new, len(new), prefill, time.perf_counter() - began)

    return generate


PEERS = {
    "llama.cpp": Peer("llama_cpp", "llama-cpp-python, which is built by a C++ compiler", of_llama_cpp),
    "openvino": Peer("openvino_genai", "openvino-genai", of_openvino),
}
