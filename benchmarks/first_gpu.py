"""What a GPU computes and how fast, in eight minutes: for cards that nobody has tried yet.

    python benchmarks/first_gpu.py                                        # a Llama of random weights, 1B
    python benchmarks/first_gpu.py --model FOLDER --exit_layer 8

Needs no network, and torch 2.11 or newer. Each step writes a line at once, and one that fails does not end
the others. The last line is JSON: send it.
"""

import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import parse
from benchmarks.synthetic import MODELS, random_llama
from measures.comparison import find_difference
from runs.program import run
from self_speculation import GenerationConfig, LoadingOptions, Request, default_model, make_strategy
from self_speculation.decoding.grammar import Grammar, GrammarProcessor
from self_speculation.loading.loading import load_model_and_tokenizer
from self_speculation.passes.captured_runner import GraphRecorder, num_captures
from self_speculation.passes.fused_layers import FusedRunner
from self_speculation.passes.runners import capture_decoding, fuse
from self_speculation.scheduler import Scheduler

_LIMIT = 480.0  # seconds, after which no step begins
_SHAPE = "Llama-3.2-1B"  # of the model that is made
_REPEATS = 50  # of attention in a graph that is timed


@dataclass(frozen=True)
class FirstGPUArguments:
    """What is tried."""

    model: str = ""
    """A folder with a model; none: one of random weights is made."""
    exit_layer: int = 4
    """Of drafts."""
    num_speculations: int = 6
    """Tokens of a draft."""
    max_steps: int = 128
    """Tokens of an answer."""


class Tried:
    """The steps, over one model. Each returns what it has found."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: FirstGPUArguments
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._args = args
        self._layers = {"exit_layer": args.exit_layer, "num_speculations": args.num_speculations}
        self._prompts = [
            [(31 * row + 7 * i) % (model.config.vocab_size - 5) + 5 for i in range(40 + 60 * row)]
            for row in range(8)
        ]
        self._plain: list[int] = []

    def steps(self) -> Mapping[str, Callable[[], Mapping[str, Any]]]:
        kinds: dict[str, Mapping[str, Any]] = {"plain": {}, "self-speculative": self._layers}
        kinds |= {"adaptive": {"generation_strategy": "adaptive"}, "int4 drafts": self._int4()}
        return {
            "kernels": self.kernels,
            "transformers": self.transformers,
            **{f"eager {name}": partial(self.answer, way) for name, way in kinds.items()},
            "eager, batch of 8": lambda: self.batch(self._layers),
            "guided": self.guided,
            "capture": self.capture,
            **{f"captured {name}": partial(self.answer, way) for name, way in kinds.items()},
            "captured, batch of 8": lambda: self.batch(self._layers),
        }

    def kernels(self) -> Mapping[str, Any]:
        """Microseconds of attention of a layer by our kernels, and GB/s of keys and values that it reads."""
        runner = FusedRunner(self._model)
        if runner.why_no_kernels is not None:
            return {"none": runner.why_no_kernels}
        found = {}
        kv_heads, size = runner.key_shape
        heads = self._model.config.num_attention_heads
        for rows, width, length in ((1, 1, 1000), (1, 8, 1000), (8, 1, 1000), (1, 1, 8000)):
            like = runner.tables.like
            keys, values = (like.new_zeros(rows, kv_heads, length + width, size) for _ in range(2))
            qkv = like.new_zeros(rows * width, (heads + 2 * kv_heads) * size)
            cos, sin = runner.tables.cos_sin(runner.attention_types[0].rotation, length + width)
            positions = torch.arange(length, length + width, device=like.device).expand(rows, -1).contiguous()
            given = (qkv, None, None, 0.0, False, cos, sin, keys, values, positions, size**-0.5, None)
            # In a graph, since the host's calls take longer than the kernels; each on a stream of its own.
            attend = partial(torch.ops.self_speculation.decode_attention, *given)
            replay = GraphRecorder(runner.device)(partial(_repeat, attend))
            seconds = self._seconds(replay) / _REPEATS
            speed = 2 * keys.nbytes / seconds / 1e9
            found[f"{rows} x {width} after {length}"] = f"{1e6 * seconds:.0f} us, {speed:.0f} GB/s"
        return found

    def transformers(self) -> Mapping[str, Any]:
        ids = torch.tensor(self._prompts[:1], device=self._model.device)
        given: dict[str, Any] = {
            "max_new_tokens": self._args.max_steps,
            "do_sample": False,
            "eos_token_id": None,
        }
        given |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}

        def generate() -> torch.Tensor:
            return self._model.generate(ids, **given)

        self._plain = generate()[0, ids.shape[1] :].tolist()
        return {"tokens/s": round(len(self._plain) / self._seconds(generate), 1)}

    def answer(self, way: Mapping[str, Any]) -> Mapping[str, Any]:
        """Speed of the second answer, and its difference from that of transformers, if any."""
        for _ in range(2):
            result = self._results(self._prompts[:1], 1, way)[0]
        speed = result.num_decode_tokens / max(result.decode_time, 1e-9)
        return {"tokens/s": round(speed, 1), **self._difference(0, self._plain, result.predicted_tokens)}

    def batch(self, way: Mapping[str, Any]) -> Mapping[str, Any]:
        """Speed of eight rows that differ in length, and the first difference from each alone."""
        alone = [self._results([prompt], 1, {})[0].predicted_tokens for prompt in self._prompts]
        began = time.perf_counter()
        results = self._results(self._prompts, 8, way)
        seconds = time.perf_counter() - began
        pairs = enumerate(zip(alone, results, strict=True))
        differences = [self._difference(row, ids, result.predicted_tokens) for row, (ids, result) in pairs]
        total = sum(len(result.predicted_tokens) for result in results)
        return {"tokens/s": round(total / seconds, 1), "rows": [d for d in differences if "difference" in d]}

    def guided(self) -> Mapping[str, Any]:
        """Digits and nothing else."""
        vocabulary = self._model.config.vocab_size
        end = self._tokenizer.eos_token_id
        processor = GrammarProcessor(Grammar.regex("[0-9]{20}"), self._tokenizer, vocabulary, [end])
        request = Request(self._prompts[0], [processor], eos_token_ids=[end])
        text = self._tokenizer.decode(self._results([request], 1, self._layers)[0].predicted_tokens)
        return {"text": text, "conforms": text.strip().isdigit()}

    def capture(self) -> Mapping[str, Any]:
        """Seconds until all passes of adaptive decoding are captured, and their number."""
        capture_decoding(self._model)
        config = self._config({"generation_strategy": "adaptive"})
        scheduler = Scheduler[int](make_strategy("adaptive"), self._model, config, 1)
        began = time.perf_counter()
        scheduler.run_every_pass(1000)
        self._synchronize()
        return {"seconds": round(time.perf_counter() - began, 2), "captures": num_captures(self._model)}

    def _int4(self) -> Mapping[str, Any]:
        depth = self._model.config.num_hidden_layers
        return {**self._layers, "exit_layer": depth, "draft_weights": "int4"}

    def _config(self, way: Mapping[str, Any]) -> GenerationConfig:
        drafted = "self_speculative" if "exit_layer" in way else "autoregressive"
        settings = {"generation_strategy": drafted, "sample": False, "max_steps": self._args.max_steps}
        return GenerationConfig(**{**settings, **way})

    def _results(self, prompts: Sequence[Any], batch_size: int, way: Mapping[str, Any]) -> list[Any]:
        config = self._config(way)
        requests = [each if isinstance(each, Request) else Request(each) for each in prompts]
        strategy = make_strategy(config.generation_strategy)
        found = dict(strategy.generate_batch(self._model, requests, config, batch_size))
        for error in found.values():
            if isinstance(error, Exception):
                raise error
        return [found[row] for row in range(len(prompts))]

    def _difference(self, row: int, first: list[int], second: list[int]) -> Mapping[str, Any]:
        """The largest gap of a near-tie is what rounding did here."""
        found = find_difference(self._model, self._prompts[row], first, second)
        return {} if found is None else {"difference": found}

    def _seconds(self, compute: Callable[[], object]) -> float:
        """Of the second time."""
        for _ in range(2):
            self._synchronize()
            began = time.perf_counter()
            compute()
        self._synchronize()
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def _repeat(compute: Callable[[], object]) -> None:
    for _ in range(_REPEATS):
        compute()


def try_all(tried: Tried, found: dict[str, Any]) -> None:
    """Writes a line for each step into `found` and to standard output."""
    began = time.perf_counter()
    for name, step in tried.steps().items():
        if time.perf_counter() - began > _LIMIT:
            found[name] = {"error": "no time was left"}
        else:
            try:
                found[name] = step()
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(f"{name}: {json.dumps(found[name], default=str)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    (args,) = parse(__doc__ or "", FirstGPUArguments, args=argv)
    if not torch.cuda.is_available():
        print("first_gpu.py: torch sees no GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    found = dict[str, Any]()
    found["card"] = {"name": torch.cuda.get_device_name(device), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            found["card"][package] = version(package)
        except PackageNotFoundError:
            found["card"][package] = None
    print(f"card: {json.dumps(found['card'])}", flush=True)
    if args.model:
        model, tokenizer = load_model_and_tokenizer(args.model, LoadingOptions())
    else:
        config = copy.deepcopy(MODELS[_SHAPE])
        config.tie_word_embeddings = False
        model, _ = random_llama(config, args.exit_layer, 0.9, device)
        tokenizer = AutoTokenizer.from_pretrained(default_model())
    fuse(model)
    try_all(Tried(model, tokenizer, args), found)
    print(json.dumps(found, default=str))
    return int(any("error" in result for result in found.values()))


if __name__ == "__main__":
    run(main)
