"""A script's work on examples: a record for each, exactly once, over ranks, errors and interruptions."""

import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from arguments import GenerationConfig, ModelArguments, RunArguments, refuse
from data import DataArguments, Example
from runs import ranks
from runs.description import Record, counted, describe, describe_model, fewest_threads
from runs.failures import Failed, reason
from runs.records import Run, check_same_run
from runs.startup import encode_chat, load_generator
from runs.status import print_status
from self_speculation import HuggingfaceLlamaGenerator, Request
from self_speculation.machine.devices import is_lost_rank
from self_speculation.models.families import context_length
from self_speculation.text.texts import Thinking


@dataclass(frozen=True)
class Encoded(Example):
    """An example that fits into the model's context.

    Attributes:
        encode: answers so far -> the ids of all earlier turns and the next one, and how its answer thinks.
    """

    ids: list[int]  # the first prompt's, with --chat True in the chat template
    thinking: Thinking | None  # of the answer, with --chat True
    encode: Callable[[Sequence[str]], tuple[list[int], Thinking | None]]


@dataclass
class Experiment(ABC):
    """Work on examples; a record is about an example, unless a subclass names another unit."""

    generator: HuggingfaceLlamaGenerator
    config: GenerationConfig
    examples: list[Encoded]
    seed: int  # of example 0; example i has seed + i
    batch_size: int

    unit = "example"

    @property
    def names(self) -> Sequence[str]:
        """What each record is about, for messages."""
        return [f"example {index}" for index in range(len(self.examples))]

    def request(self, index: int) -> Request:
        """The request of an example, with the seed of the example."""
        example = self.examples[index]
        return Request(example.ids, seed=self.seed + index, thinking=example.thinking)

    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
        """Yield index and record, or error, of each index, in any order.

        A record depends on index and flags alone, except for times.
        """
        for index in indices:
            try:
                record: Record | Exception = self.measure(index)
            except Exception as error:
                record = error
            yield index, record

    def measure(self, index: int) -> Record:
        """The record of an index, for work that makes one after the other."""
        raise NotImplementedError

    @abstractmethod
    def report(self, run: Run, records: list[Record]) -> int:
        """Finish the run with all records in order, and print the figures; the exit status."""


def run_experiment(
    script: str,
    make: Callable[..., Experiment],
    model_args: ModelArguments,
    config: GenerationConfig,
    data_args: DataArguments,
    args: RunArguments,
    examples: list[Example],
    **settings: object,
) -> int:
    """Load the model, and do the work on the examples that fit it; the exit status.

    Args:
        make: called with the fields of an `Experiment`, and `settings`.
        args: the arguments of the script alone.
        examples: of `runs.flags.read_examples`.
    """
    description = describe(script, (model_args, config, data_args, args))
    try:
        if args.resume is not None:
            check_same_run(args.resume, description)
    except Failed as error:
        refuse(str(error))
    generator = load_generator(model_args, config, data_args.chat)
    description |= describe_model(model_args.model_name, generator.model)
    fitting = _examples_that_fit(generator, examples, data_args)
    if script != "benchmark" and any(example.later_turns for example in fitting):
        print_status(f"{script}.py asks the first turn of each conversation only")
    experiment = make(generator, config, fitting, model_args.seed, args.batch_size, **settings)
    return _work_off(experiment, partial(Run.open, model_args.output_dir, args.resume, description))


def _examples_that_fit(
    generator: HuggingfaceLlamaGenerator, examples: list[Example], data_args: DataArguments
) -> list[Encoded]:
    """Keep the examples whose prompts leave room for an answer in the context; print how many do not."""
    room = context_length(generator.model.config) - 1
    # Turns of a conversation need the template, where there is one.
    chat = data_args.chat or (data_args.dataset == "spec_bench" and generator.tokenizer.chat_template)

    def encode(example: Example, answers: Sequence[str] = ()) -> tuple[list[int], Thinking | None]:
        asked = [example.prompt, *example.later_turns[: len(answers)]]
        earlier = zip(asked, answers, strict=False)  # the last prompt has no answer yet
        turns = [*itertools.chain(*earlier), asked[-1]]
        if not chat:  # a blank line after each answer
            return generator.encode("".join(text + "\n\n" * (i % 2) for i, text in enumerate(turns))), None
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        return encode_chat(generator, messages, data_args.template_kwargs)

    def encoded(example: Example) -> Encoded:
        ids, thinking = encode(example)
        return Encoded(**vars(example), ids=ids, thinking=thinking, encode=partial(encode, example))

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


def _work_off(experiment: Experiment, open_run: Callable[[], Run]) -> int:
    """Make the missing records of a run, each rank a share, and let rank 0 conclude.

    Every record is kept. The exit status is the report's, 130 after Ctrl-C or SIGTERM, or 1 if
    records are missing; `status` in `run.json` is then `interrupted` or `failed`.
    """
    with ranks.process_group():
        try:
            run = ranks.share(open_run)
        except Failed as error:
            refuse(str(error))
        kept = ranks.share(run.records)
        number = len(experiment.names)
        missing = [index for index in range(number) if index not in kept]
        try:
            _make_records(experiment, run, missing[ranks.rank() :: ranks.num_processes()])
            ranks.barrier()
            if not ranks.is_first():
                return 0
            complete = run.records()
            records = [complete[index] for index in range(number)]
            run.description["threads_used"] = fewest_threads(records, run.description["threads"])
            return experiment.report(run, records)
        except (Exception, KeyboardInterrupt) as error:
            is_stopped = isinstance(error, KeyboardInterrupt)
            if ranks.is_first():
                with suppress(Failed):
                    run.write_status("interrupted" if is_stopped else "failed")
            why = reason(error, batch_size=experiment.batch_size)
            if not (why or is_stopped or is_lost_rank(error)):
                raise
            if why or ranks.is_first():
                why = why or ("interrupted" if is_stopped else "another rank is gone")
                kept_ones = (
                    f"{len(run.records())} of {counted(len(experiment.names), experiment.unit)} are kept"
                )
                print(f"{why}; {kept_ones}, go on with {run.resume_command}", file=sys.stderr)
            return 130 if is_stopped else 1


def _make_records(experiment: Experiment, run: Run, indices: Sequence[int]) -> None:
    """Write the records of this rank's indices.

    Raises:
        Failed: the first error, after all other records are written.
    """
    wrong = []
    hidden = None if ranks.is_first() else True  # None: unless at a terminal
    with tqdm(total=len(indices), desc=f"{experiment.unit}s", disable=hidden) as bar:
        for index, record in experiment.records(indices):
            if isinstance(record, Exception):
                if (why := reason(record, batch_size=experiment.batch_size)) is None:
                    raise record
                wrong.append(f"{experiment.names[index]}: {why}")
                continue
            run.append({"index": index, **record})
            bar.update()
    if wrong:
        raise Failed(wrong[0])
