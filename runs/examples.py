"""A script's work on each example: exactly once, over ranks and interruptions."""

from __future__ import annotations

import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from arguments import BatchArguments, GenerationConfig, ModelArguments, refuse
from data import DataArguments, DataError, Example, load_examples
from runs import ranks
from runs.description import Record, counted, describe, describe_model, fewest_threads
from runs.failures import Failed, check_writable, failed, reason
from runs.records import Run, check_same_run
from runs.startup import encode_chat, load_generator
from runs.status import print_status
from self_speculation import HuggingfaceLlamaGenerator, Request
from self_speculation.decoding.texts import Thinking
from self_speculation.devices import is_lost_rank
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
class Experiment(ABC):
    """A script's work: a record for each example, and the conclusion."""

    generator: HuggingfaceLlamaGenerator
    config: GenerationConfig
    examples: list[Encoded]
    seed: int  # of example 0; example i has seed + i
    batch_size: int

    unit = "examples"  # that the progress bar counts

    @property
    def num_records(self) -> int:
        """The number of records, with indices from 0."""
        return len(self.examples)

    def name(self, index: int) -> str:
        """The name of an index in messages."""
        return f"example {index}"

    @property
    def longest_prompt(self) -> list[int]:
        """The prompt to warm up with."""
        return max((example.ids for example in self.examples), key=len)

    def warm_up(self) -> None:  # noqa: B027  # not all experiments are timed
        """Run every pass that will be timed."""

    def requests(self, indices: Iterable[int]) -> dict[int, Request]:
        """The requests of these examples, by index, each with its own seed."""
        return {index: self.examples[index].request(self.seed + index) for index in indices}

    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
        """Yield index and record, or error, of each index, in any order.

        A record depends on index and flags alone, except for its times.
        """
        for index in indices:
            try:
                record: Record | Exception = self.measure(index)
            except Exception as error:
                record = error
            yield index, record

    def measure(self, index: int) -> Record:
        """The record of an index, for experiments that make one after the other."""
        raise NotImplementedError

    @abstractmethod
    def conclude(self, run: Run, records: list[Record]) -> int:
        """Finish the run with all records in order; the exit status."""


def run_experiment(
    script: str,
    make: Callable[..., Experiment],
    model_args: ModelArguments,
    config: GenerationConfig,
    data_args: DataArguments,
    args: Any,
    batch: BatchArguments,
) -> int:
    """Load the model and the examples that fit it, make the missing records, each rank its share, and let
    rank 0 conclude.

    The exit status is that of the conclusion, 130 after Ctrl-C, or 1 if records are missing.

    Args:
        make: called with the first fields of an `Experiment`.
        args: the script's own arguments, with `resume`.
    """
    check_writable("resume" if args.resume else "output_dir", args.resume or model_args.output_dir)
    try:
        examples = load_examples(data_args, model_args.seed)
        description = describe(script, (model_args, config, data_args, args, batch))
        if args.resume is not None:
            check_same_run(args.resume, description)
    except (DataError, Failed) as error:
        refuse(str(error))
    generator = load_generator(model_args, config, data_args.chat)
    description |= describe_model(model_args.model_name, generator.model)
    fitting = _examples_that_fit(generator, examples, data_args)
    if script != "benchmark" and any(example.later_turns for example in fitting):
        print_status(f"{script}.py asks the first turn of each conversation only")
    experiment = make(generator, config, fitting, model_args.seed, batch.batch_size)
    experiment.warm_up()
    return _run(experiment, partial(Run.open, model_args.output_dir, args.resume, description))


def _run(experiment: Experiment, open_run: Callable[[], Run]) -> int:
    with ranks.process_group():
        try:
            run = ranks.share(open_run)
        except Failed as error:
            refuse(str(error))
        finished = ranks.share(run.records)
        missing = [index for index in range(experiment.num_records) if index not in finished]
        status, why = 1, ""
        try:
            _measure(experiment, run, missing[ranks.rank() :: ranks.num_processes()])
            ranks.barrier()
            if ranks.rank() != 0:
                return 0
            complete = run.records()
            records = [complete[index] for index in range(experiment.num_records)]
            run.description["threads_used"] = fewest_threads(records, run.description["threads"])
            return experiment.conclude(run, records)
        except Exception as error:
            why = reason(error, batch_size=experiment.batch_size) or ""
            if not (why or is_lost_rank(error)):
                raise
        except KeyboardInterrupt:
            status = 130
            if ranks.rank() == 0:
                with suppress(Failed):
                    run.write_status("interrupted")
        if why or ranks.is_first():
            why = why or ("interrupted" if status == 130 else "another rank is gone")
            kept = f"{len(run.records())} of {counted(experiment.num_records, experiment.unit[:-1])} are kept"
            print(f"{why}; {kept}, go on with --resume {run.folder}", file=sys.stderr)
        return status


def _measure(experiment: Experiment, run: Run, indices: Sequence[int]) -> None:
    """Write the records of this rank's indices.

    Raises:
        Failed: the first error, after all other records are written.
    """
    wrong = []
    hidden = None if ranks.rank() == 0 else True  # None: unless at a terminal
    with tqdm(total=len(indices), desc=experiment.unit, disable=hidden) as bar:
        for index, record in experiment.records(indices):
            if isinstance(record, Exception):
                wrong.append(failed(experiment.name(index), record, experiment.batch_size))
                continue
            run.append({"index": index, "threads": torch.get_num_threads(), **record})
            bar.update()
    if wrong:
        raise wrong[0]


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
