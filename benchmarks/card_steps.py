"""The steps of first_gpu.py: what a card computes, and how fast."""

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.kernel_steps import REPEATS, Found, KernelSteps, repeat
from benchmarks.synthetic import MODELS, random_llama
from measures.comparison import find_difference
from self_speculation import (
    GenerationConfig,
    LoadingOptions,
    Request,
    default_model,
    load_model_and_tokenizer,
    make_strategy,
)
from self_speculation.backends.captures import num_captures
from self_speculation.backends.runners import capture_decoding, fuse, is_captured, make_runner
from self_speculation.backends.sampling import Sampler
from self_speculation.engine.scheduler import Scheduler
from self_speculation.machine.devices import free_memory
from self_speculation.text.grammar import Grammar, GrammarProcessor

_SHAPE = "Llama-3.2-1B"  # of the model that is made
_PROMPT = 1000  # tokens


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


class Tried(KernelSteps):
    """The steps, over one model. Each returns what it has found.

    Attributes:
        layers: settings of drafts by an exit.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: FirstGPUArguments
    ) -> None:
        super().__init__(model)
        self._tokenizer = tokenizer
        self._args = args
        self.layers = {"exit_layer": args.exit_layer, "num_speculations": args.num_speculations}
        self._prompts = [self._prompt(row, _PROMPT - row * _PROMPT // 25) for row in range(8)]

    def transformers(self, **more: Any) -> Found:
        return {"tokens/s": round(self._args.max_steps / self.seconds_of(partial(self._generate, **more)), 1)}

    def _generate(self, **more: Any) -> list[int]:
        """Ids of transformers."""
        ids = torch.tensor(self._prompts[:1], device=self._model.device)
        mask = torch.ones_like(ids)
        given = {"max_new_tokens": self._args.max_steps, "do_sample": False, "eos_token_id": None, **more}
        ids = self._model.generate(ids, attention_mask=mask, pad_token_id=0, **given)
        return ids[0, len(self._prompts[0]) :].tolist()

    @cached_property
    def _plain(self) -> list[int]:
        return self._generate()

    def answer(self, way: Found, captured: bool = False, plain: Found | None = None) -> Found:
        """Speed of the second answer, and the first difference: from transformers, or from a plain one."""
        if captured and (why := self._why_not_captured()):
            return {"none": why}
        for _ in range(2):
            result = self._results(self._prompts[:1], 1, way)[0]
        speed = result.num_decode_tokens / max(result.decode_time, 1e-9)
        found = {"tokens/s": round(speed, 1)}
        if (stats := result.draft_stats) is not None:
            rounds = stats.num_verifications
            found |= {"rounds": rounds, "ms a round": round(1e3 * result.decode_time / max(rounds, 1), 2)}
            found |= {"accepted": stats.num_accepted, "drafted": stats.num_drafted}
        if plain is None:
            expected = self._plain
        else:
            expected = self._results(self._prompts[:1], 1, plain)[0].predicted_tokens
        sampler = Sampler.of(self._config(plain or {}))
        difference = self._difference(self._prompts[0], expected, result.predicted_tokens, sampler)
        return {**found, **difference}

    def batch(self, way: Found, captured: bool = False) -> Found:
        """Speed of the second batch of eight rows that differ in length, after the prompts, and the first
        difference of each row from a batch of one.
        """
        if captured and (why := self._why_not_captured()):
            return {"none": why}
        alone = [self._results([prompt], 1, {})[0].predicted_tokens for prompt in self._prompts]
        for _ in range(2):
            results = self._results(self._prompts, 8, way)
        total = sum(result.num_decode_tokens for result in results)
        seconds = max(result.decode_time for result in results)
        rows = zip(self._prompts, alone, results, strict=True)
        differences = [self._difference(prompt, ids, each.predicted_tokens) for prompt, ids, each in rows]
        return {"tokens/s": round(total / max(seconds, 1e-9), 1), "rows": [d for d in differences if d]}

    def guided(self) -> Found:
        """Digits and nothing else."""
        vocabulary = self._model.config.vocab_size
        end = self._tokenizer.eos_token_id
        processor = GrammarProcessor(Grammar.regex("[0-9]{20}"), self._tokenizer, vocabulary, [end])
        request = Request(self._prompts[0], [processor], eos_token_ids=[end])
        text = self._tokenizer.decode(self._results([request], 1, self.layers)[0].predicted_tokens)
        return {"text": text, "conforms": text.strip().isdigit()}

    def _why_not_captured(self) -> str | None:
        if not is_captured(self._model):
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                capture_decoding(self._model)
            if warned:
                return str(warned[0].message)
        return None

    def capture(self) -> Found:
        """Seconds until all passes of adaptive decoding are captured, their number, and GB that they take."""
        if why := self._why_not_captured():
            return {"none": why}
        config = self._config({"generation_strategy": "adaptive"})
        scheduler = Scheduler[int](make_strategy("adaptive"), self._model, config, 1)
        free = free_memory(self._model.device)
        began = time.perf_counter()
        scheduler.capture_passes(_PROMPT + self._args.max_steps)
        self.synchronize()
        seconds = time.perf_counter() - began
        taken = (free - free_memory(self._model.device)) / 1e9
        return {"seconds": round(seconds, 2), "captures": num_captures(self._model), "GB": round(taken, 3)}

    @torch.inference_mode()
    def passes(self) -> Found:
        """Milliseconds of each kind of captured pass after a prompt, with the head."""
        if why := self._why_not_captured():
            return {"none": why}
        runner = make_runner(self._model)
        depth = len(runner.layers)
        exit_layer = self._args.exit_layer
        width = self._args.num_speculations + 1
        cache = runner.new_cache(_PROMPT, _PROMPT + 2 * width)
        ids = torch.tensor(self._prompts[:1], device=self._model.device)
        cache.is_prompt = True
        runner.run(cache, ids)
        cache.rollback(0)
        cache.is_prompt = False
        states = runner.embed(ids[:, :width])

        def one(inputs: Tensor, first: int, last: int) -> None:
            runner.run(cache, inputs, first, last, num_logits=inputs.shape[1])
            cache.rollback_draft()

        kinds: dict[str, tuple[Tensor, int, int]] = {
            "plain step": (ids[:, :1], 0, depth),
            "draft step": (ids[:, :1], 0, exit_layer),
            "verification of exits": (states, exit_layer, depth),
            "verification by all layers": (ids[:, :width], 0, depth),
        }
        found = {}
        for name, given in kinds.items():
            found[name] = round(1e3 * self.seconds_of(partial(repeat, partial(one, *given))) / REPEATS, 3)
        return found

    def growth(self) -> Found:
        """A prompt twice as long, for which the cache grows and passes are captured anew."""
        if why := self._why_not_captured():
            return {"none": why}
        prompt = self._prompt(3, 2 * _PROMPT)
        plain = self._results([prompt], 1, {})[0].predicted_tokens
        result = self._results([prompt], 1, self.layers)[0]
        speed = len(prompt) / max(result.prefill_time, 1e-9)
        difference = self._difference(prompt, plain, result.predicted_tokens)
        return {"prompt tokens/s": round(speed), "captures": num_captures(self._model), **difference}

    def windows(self) -> Found:
        """A small model in float16 whose layers see a window, eager and captured, against transformers."""
        config = MistralConfig(
            vocab_size=self._model.config.vocab_size, hidden_size=512, intermediate_size=1024,
            num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
            sliding_window=100, max_position_embeddings=8192, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(self._model.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=4.0)
        tried = Tried(model, self._tokenizer, self._args)
        fuse(model)
        way = {"exit_layer": 1, "num_speculations": 3}
        return {"eager": tried.answer(way), "captured": tried.answer(way, True)}

    def int4(self) -> Found:
        depth = self._model.config.num_hidden_layers
        return {**self.layers, "exit_layer": depth, "draft_weights": "int4"}

    def _prompt(self, row: int, length: int) -> list[int]:
        return [(31 * row + 7 * i) % (self._model.config.vocab_size - 5) + 5 for i in range(length)]

    def _config(self, way: Found) -> GenerationConfig:
        drafted = "self_speculative" if "exit_layer" in way else "autoregressive"
        settings = {"generation_strategy": drafted, "sample": False, "max_steps": self._args.max_steps}
        return GenerationConfig(**{**settings, **way})

    def _results(self, prompts: Sequence[Any], batch_size: int, way: Found) -> list[Any]:
        config = self._config(way)
        requests = [each if isinstance(each, Request) else Request(each, seed=0) for each in prompts]
        strategy = make_strategy(config.generation_strategy)
        found = dict(strategy.generate_batch(self._model, requests, config, batch_size))
        for error in found.values():
            if isinstance(error, Exception):
                raise error
        return [found[row] for row in range(len(prompts))]

    def _difference(
        self, prompt: list[int], first: list[int], second: list[int], sampler: Sampler | None = None
    ) -> Found:
        """The largest gap of a near-tie is what rounding did here."""
        sampler = sampler or Sampler(temperature=0.0)
        found = find_difference(self._model, prompt, first, second, sampler=sampler)
        return {} if found is None else {"difference": found}


def make_tried(args: FirstGPUArguments) -> Tried:
    if args.model:
        model, tokenizer = load_model_and_tokenizer(args.model, LoadingOptions(compile=False))
    else:
        config = copy.deepcopy(MODELS[_SHAPE])
        config.tie_word_embeddings = False
        device = torch.device("cuda", torch.cuda.current_device())
        model, _ = random_llama(config, args.exit_layer, 0.9, device)
        tokenizer = AutoTokenizer.from_pretrained(default_model())
    fuse(model)
    return Tried(model, tokenizer, args)


_SAMPLED = {"sample": True, "temperature": 0.7, "top_p": 0.9}


def _answers(kind: str, captured: bool) -> Mapping[str, Callable[[Tried], Found]]:
    ways: dict[str, Callable[[Tried], Found]] = {
        "plain": lambda tried: {},
        "self-speculative": lambda tried: tried.layers,
        "adaptive": lambda tried: {"generation_strategy": "adaptive"},
        "int4 drafts": lambda tried: tried.int4(),
    }

    def answer(way: Callable[[Tried], Found], tried: Tried) -> Found:
        return tried.answer(way(tried), captured)

    return {f"{kind} {name}": partial(answer, way) for name, way in ways.items()}


STEPS: Mapping[str, Callable[[Tried], Found]] = {
    "memory": Tried.memory,
    "kernels, numbers": Tried.kernels_compute,
    "kernels, speed": Tried.kernels_read,
    "products": Tried.products,
    "transformers": Tried.transformers,
    **_answers("eager", captured=False),
    "eager, batch of 8": lambda tried: tried.batch(tried.layers),
    "guided": Tried.guided,
    "capture": Tried.capture,
    "captured passes": Tried.passes,
    **_answers("captured", captured=True),
    "captured, sampled": lambda tried: tried.answer({**tried.layers, **_SAMPLED}, True, _SAMPLED),
    "captured, batch of 8": lambda tried: tried.batch(tried.layers, True),
    "captured, prompt of 2,000": Tried.growth,
    "float16, windows": Tried.windows,
    "transformers, compiled": lambda tried: tried.transformers(cache_implementation="static"),
}
