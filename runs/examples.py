"""Examples as token ids, and a script's work on them."""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from arguments import GenerationConfig, ModelArguments, RunArguments, refuse
from data import DataArguments, DataError, Example, load_examples
from runs.description import Record, describe, describe_model, fewest_threads
from runs.failures import Failed, check_writable
from runs.records import Run, check_same_run
from runs.startup import encode_chat, load_generator
from runs.status import print_status
from runs.work import Work, work_off
from self_speculation import HuggingfaceLlamaGenerator, Request
from self_speculation.decoding.texts import Thinking
from self_speculation.families import context_length

# Prompts of a conversation and their answers in turn, up to a prompt -> all ids, and how its answer thinks.
Encode = Callable[[Sequence[str]], tuple[list[int], Thinking | None]]


@dataclass(frozen=True)
class Encoded(Example):
    """An example that fits into the model's context."""

    ids: list[int]  # the prompt's, with --chat True in the chat template
    thinking: Thinking | None  # of the answer, with --chat True
    encode: Encode

    def request(self, seed: int | None = None) -> Request:
        """The request of this example; without a seed, of random draws that differ from call to call."""
        return Request(self.ids, seed=seed, thinking=self.thinking)

    def next_turn(self, answers: Sequence[str], seed: int) -> Request | None:
        """The turn after these answers, or None."""
        if len(answers) > len(self.later_turns):
            return None
        asked = [self.prompt, *self.later_turns[: len(answers)]]
        earlier = zip(asked, answers, strict=False)  # the last prompt has no answer yet
        ids, thinking = self.encode([*itertools.chain(*earlier), asked[-1]])
        return Request(ids, seed=seed, thinking=thinking)


@dataclass
class Experiment(Work):
    """Work on examples; a record is that of an example, unless a subclass says otherwise."""

    generator: HuggingfaceLlamaGenerator
    config: GenerationConfig
    examples: list[Encoded]
    seed: int  # of example 0; example i has seed + i
    batch_size: int

    @property
    def names(self) -> Sequence[str]:
        return [f"example {index}" for index in range(len(self.examples))]

    @property
    def longest_prompt(self) -> list[int]:
        """The prompt to warm up with."""
        return max((example.ids for example in self.examples), key=len)

    def warm_up(self) -> None:
        """Run every pass that will be timed."""

    def requests(self, indices: Iterable[int]) -> dict[int, Request]:
        """The requests of these examples, by index, each with its own seed."""
        return {index: self.examples[index].request(self.seed + index) for index in indices}

    def conclude(self, records: list[Record]) -> int:
        about = self.run.description
        about["threads_used"] = fewest_threads(records, about["threads"])
        return self.report(self.run, records)

    @abstractmethod
    def report(self, run: Run, records: list[Record]) -> int:
        """Finish the run and print its figures; the exit status."""


def run_experiment(
    script: str,
    make: Callable[..., Experiment],
    model_args: ModelArguments,
    config: GenerationConfig,
    data_args: DataArguments,
    args: RunArguments,
) -> int:
    """Load the model and the examples that fit it, and do the work on them; the exit status.

    Args:
        make: called with the first fields of an `Experiment`.
        args: the script's own arguments.
    """
    check_writable("resume" if args.resume else "output_dir", args.resume or model_args.output_dir)
    try:
        examples = load_examples(data_args, model_args.seed)
        description = describe(script, (model_args, config, data_args, args))
        if args.resume is not None:
            check_same_run(args.resume, description)
    except (DataError, Failed) as error:
        refuse(str(error))
    generator = load_generator(model_args, config, data_args.chat)
    description |= describe_model(model_args.model_name, generator.model)
    fitting = _examples_that_fit(generator, examples, data_args)
    if script != "benchmark" and any(example.later_turns for example in fitting):
        print_status(f"{script}.py asks the first turn of each conversation only")
    experiment = make(generator, config, fitting, model_args.seed, args.batch_size)
    experiment.warm_up()
    return work_off(experiment, partial(Run.open, model_args.output_dir, args.resume, description))


def _examples_that_fit(
    generator: HuggingfaceLlamaGenerator, examples: list[Example], data_args: DataArguments
) -> list[Encoded]:
    """Keep the examples whose prompts leave room for an answer in the context; print how many do not."""
    room = context_length(generator.model.config) - 1
    # Turns of a conversation need the template, where there is one.
    chat = data_args.chat or (data_args.dataset == "spec_bench" and generator.tokenizer.chat_template)

    def encode(said: Sequence[str]) -> tuple[list[int], Thinking | None]:
        if not chat:  # a blank line after each answer
            return generator.encode("".join(text + "\n\n" * (i % 2) for i, text in enumerate(said))), None
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        return encode_chat(generator, messages, data_args.template_kwargs)

    def encoded(example: Example) -> Encoded:
        ids, thinking = encode([example.prompt])
        return Encoded(**vars(example), ids=ids, thinking=thinking, encode=encode)

    try:
        short = (example for example in examples if not generator.is_far_too_long(example.prompt))
        fitting = [example for example in map(encoded, short) if len(example.ids) <= room]
    except ValueError as error:
        refuse(str(error))
    if not fitting:
        shots = f"--n_shot {data_args.n_shot}: with solved examples " * bool(data_args.n_shot)
        refuse(f"{shots}every prompt has more than the {room} tokens that the model has room for")
    if left_out := len(examples) - len(fitting):
        print_status(f"left out {left_out} of {len(examples)} examples: prompts of more than {room} tokens")
    return fitting
