"""Names that scripts written for the paper's code base import from modules that bear the same name here.

A module of `NAMES` that is asked for a name that it does not have looks here. Each stands for what there is
under another name, or for a call of it; nothing in this program uses them. Those of the library are in
`self_speculation/llama_model_utils.py`; `docs/moving.md` says what has no counterpart.

Imports nothing heavy before it is called: `arguments` and `data` are quick to import.
"""

from __future__ import annotations

import enum
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args

from tqdm import tqdm

from arguments import DataArguments, DatasetName, GenerationConfig, ModelArguments
from data import load_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from self_speculation import GenerationResult

_OF_MODELS = ("setup", "load_model_and_tokenizer", "Arguments")
NAMES = {
    "arguments": ("Arguments",),
    "data": ("get_data", "EvaluationExample", "DatasetFormat", "get_valid_dataset_formats"),
    "generate": (*_OF_MODELS, "StreamerType"),
    "benchmark": (*_OF_MODELS, "BenchmarkArguments", "EvaluationExample", "EvaluationMetrics", "benchmark"),
}


def lookup(module: str, name: str) -> Any:
    """What `module` does not have itself; raises AttributeError, as Python does, where there is nothing."""
    if name not in NAMES.get(module, ()):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return globals()[name]


BenchmarkArguments = DataArguments


class Arguments(ModelArguments):
    """`ModelArguments` whose fields can be set, since scripts do `args.model_args = ...`."""

    __setattr__ = object.__setattr__


class StreamerType(str, enum.Enum):
    """Values of `--streamer`."""

    NONE = "none"
    STANDARD = "standard"
    SPECULATIVE = "speculative"


DatasetFormat = SimpleNamespace(**{name.upper(): name for name in get_args(DatasetName)})


def get_valid_dataset_formats() -> list[str]:
    """Values of `--dataset`."""
    return list(get_args(DatasetName))


@dataclass(frozen=True)
class EvaluationExample:
    """A prompt, and what it should lead to."""

    input: str
    output: str


def get_data(
    random_shuffle: bool,
    num_samples: int | None,
    dataset: str,
    data_path: str | None = None,
    n_shot: int = 0,
    seed: int = 42,
    template: str | None = None,
) -> list[EvaluationExample]:
    """`data.load_examples`; raises what that raises, and ValueError for a value that is not allowed."""
    args = DataArguments(dataset, data_path, random_shuffle, num_samples, n_shot, template)  # type: ignore[arg-type]
    return [EvaluationExample(example.prompt, example.reference) for example in load_examples(args, seed)]


def setup(args: ModelArguments, device: str = "auto") -> None:  # noqa: ARG001
    """Seed all random generators, and join the other ranks where all hold one model together.

    Args:
        device: has nothing to set up.
    """
    from transformers import set_seed

    from runs.startup import meet

    set_seed(args.seed)
    meet(args)


def load_model_and_tokenizer(
    args: ModelArguments, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What the scripts load.

    Args:
        device: in place of `args.device`, unless it is auto.

    Raises:
        LoadingError: see `self_speculation.load_model_and_tokenizer`.
    """
    from runs.startup import model_name
    from self_speculation.model import loading

    options = args.loading_options(**({} if device == "auto" else {"device": device}))
    return loading.load_model_and_tokenizer(model_name(args), options)


@dataclass
class EvaluationMetrics:
    """What answers add up to."""

    results: list[GenerationResult] = field(default_factory=list)
    compared: list[tuple[str, str]] = field(default_factory=list)  # answers and references

    @classmethod
    def build_metrics(cls) -> EvaluationMetrics:
        return cls()

    def update(
        self, evaluation_example: EvaluationExample | None, generation_result: GenerationResult
    ) -> None:
        """Count an answer; compared is one that comes with an example."""
        self.results.append(generation_result)
        if evaluation_example is not None:
            self.compared.append((generation_result.decoded_prediction, evaluation_example.output))

    def compute(self) -> dict[str, dict[str, float | None]]:
        """The scores of texts by the names that they have there, see `measures.text_quality`, and means over
        all answers as {"mean": ...}, None where there is nothing to take a mean of.
        """
        rates = [result.generation_strategy_result.acceptance_rate for result in self.results]
        return {
            "predicted_text": _scores(*zip(*self.compared, strict=True)) if self.compared else {},
            "acceptance_rate": _mean([rate for rate in rates if rate is not None]),
            "total_time": _mean([result.total_time for result in self.results]),
            "time_per_token": _mean([result.time_per_token for result in self.results]),
            "tokens_per_second": _mean([result.tokens_per_second for result in self.results]),
        }


def _scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    from measures.text_quality import text_quality

    found = text_quality(answers, references)
    return {
        **{f"rouge-{n.lower()}": found[f"rouge{n}"] for n in ("1", "2", "L")},
        "bleu_score": found["bleu"] / 100,
        "exact_match": found["exact_match"],
        "edit_distance": found["edit_distance"],
    }


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(values) if values else None}


def benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmark_arguments: DataArguments,
    generation_config: GenerationConfig,
    seed: int | None = None,
) -> dict[str, dict[str, float | None]]:
    """Answer every example, after a warm-up; what `EvaluationMetrics.compute` makes of the answers.

    Args:
        seed: of examples and draws; 42 where there is none.
    """
    from measures.timed_runs import warm_up
    from runs.examples import longest_prompt
    from self_speculation import HuggingfaceLlamaGenerator, make_strategy

    strategy = make_strategy(generation_config.generation_strategy)
    generator = HuggingfaceLlamaGenerator(tokenizer, model, strategy)
    examples = load_examples(benchmark_arguments, 42 if seed is None else seed)
    warm_up([("", generator, generation_config)], longest_prompt(examples))
    metrics = EvaluationMetrics.build_metrics()
    for example in tqdm(examples):
        answer = generator.generate(example.prompt, generation_config)
        metrics.update(EvaluationExample(example.prompt, example.reference), answer)
    return metrics.compute()
