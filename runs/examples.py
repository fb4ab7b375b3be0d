"""A script's work on each example, done exactly once even over several ranks and interruptions."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import PretrainedConfig

from arguments import BatchArguments, DataArguments, GenerationConfig, ModelArguments, refuse
from data import DataError, Example, fingerprint, load_examples
from runs import ranks
from runs.failures import EXPLAINABLE, Failed, failed, less_than, reason
from runs.records import (
    Record,
    RecordError,
    Run,
    check_same_run,
    check_writable,
    describe,
    describe_model,
    open_run,
)
from runs.startup import load_generator, meet, model_name
from self_speculation import HuggingfaceLlamaGenerator, Request
from self_speculation.model.families import context_length, sliding_window


@dataclass(frozen=True)
class Encoded(Example):
    """An example that fits the model."""

    ids: list[int]  # of its prompt; with --chat True, within the chat template


@dataclass
class Job(ABC):
    """A script's work: what it does with each example, says meanwhile, and concludes in the end.

    Args:
        seed: that of example i is seed + i.
        batch_size: sequences decoded at a time.
    """

    generator: HuggingfaceLlamaGenerator
    config: GenerationConfig
    examples: list[Encoded]
    seed: int
    batch_size: int

    unit = "examples"  # what the progress bar counts

    @property
    def num_steps(self) -> int:
        """How many records there will be: one for each index from 0."""
        return len(self.examples)

    def name(self, index: int) -> str:
        """What a message calls the work on an index."""
        return f"example {index}"

    def requests(self, indices: Iterable[int]) -> dict[int, Request]:
        return {index: Request(self.examples[index].ids, seed=self.seed + index) for index in indices}

    @abstractmethod
    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
        """The records of these indices as they come, in any order, each with its index; of one that something
        is wrong with, the error.

        Timings aside, a record must depend on index and flags alone.
        """

    @abstractmethod
    def progress(self, records: Sequence[Record]) -> str:
        """What the progress bar says of the records so far, the newest last."""

    @abstractmethod
    def conclude(self, run: Run, records: list[Record]) -> int:
        """Finish the run with all records in order; the exit status."""

    def after_each(self, run: Run) -> None:  # noqa: B027
        """Called at rank 0 whenever it has written a record."""


class OneByOne(Job):
    """A job whose records are made one after the other."""

    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
        for index in indices:
            try:
                record: Record | Exception = self.measure(index)
            except Exception as error:
                record = error
            yield index, record

    @abstractmethod
    def measure(self, index: int) -> Record:
        """The record of an index."""


def prepare(
    script: str,
    model_args: ModelArguments,
    config: GenerationConfig,
    data_args: DataArguments,
    args: Any,
    batch: BatchArguments,
    model_config: PretrainedConfig | None = None,
    counted: Mapping[int, int] | None = None,
) -> tuple[HuggingfaceLlamaGenerator, list[Encoded], Callable[[], Run]]:
    """What a script over a dataset needs: the model, the examples that fit it, and how to open the run.

    What can be refused before the model is loaded is refused before.

    Args:
        args: the script's own, `resume` among them.
        model_config, counted: as for `load_generator`.
    """
    meet(model_args)
    try:
        check_writable(args.resume, model_args.output_dir)
        examples = load_examples(data_args, model_args.seed)
        arguments = (model_args, config, data_args, args, batch)
        description = describe(script, arguments, fingerprint(examples))
        if args.resume is not None:
            check_same_run(args.resume, description, arguments)
    except (DataError, RecordError) as error:
        refuse(str(error))
    generator = load_generator(model_args, config, model_config, data_args.chat, counted)
    resume, output_dir = ranks.place_to_write(args.resume, model_args.output_dir)
    description |= describe_model(model_name(model_args), generator.model)
    fitting = _examples_that_fit(generator, examples, config.max_steps, data_args.chat)
    return generator, fitting, lambda: open_run(resume, output_dir, script, description)


def run_examples(job: Job, open_run: Callable[[], Run]) -> int:
    """Make the records that are missing, each rank its share; then draw the conclusion, at rank 0.

    Args:
        open_run: makes or reopens the run's folder; called at rank 0 only.

    Returns:
        The exit status: 130 after Ctrl-C, 1 where records could not be written.
    """
    with ranks.process_group():
        try:
            run = ranks.share(open_run)
        except RecordError as error:
            refuse(str(error))
        finished = ranks.share(run.records)
        missing = [index for index in range(job.num_steps) if index not in finished]
        status, why = 1, ""
        try:
            _measure(job, run, missing[ranks.rank() :: ranks.world_size()], list(finished.values()))
            ranks.barrier()
            if ranks.rank() != 0:
                return 0
            complete = run.records()
            return job.conclude(run, [complete[index] for index in range(job.num_steps)])
        except (RecordError, Failed) as error:
            why = str(error)
        except EXPLAINABLE as error:
            why = reason(error, less_than(job.batch_size)) or ""
            if not why and not ranks.is_lost(error):
                raise
        except KeyboardInterrupt:
            status = 130
            if ranks.rank() == 0:
                with suppress(RecordError):
                    run.say("interrupted")
        if why or ranks.is_first():  # what ends all ranks is said by the first
            why = why or ("interrupted" if status == 130 else "another rank is gone")
            kept = f"{len(run.records())} of {job.num_steps} {job.unit} are kept"
            print(f"{why}; {kept}, go on with --resume {run.folder}", file=sys.stderr)
        return status


def _measure(job: Job, run: Run, indices: Sequence[int], records: list[Record]) -> None:
    """Write the records of this rank's examples; `records` are those that were finished before.

    Raises:
        Failed: what is wrong with the first of those that something is wrong with, after all others.
    """
    writer, wrong = run.writer(ranks.rank()), []
    with tqdm(total=len(indices), desc=job.unit, disable=ranks.rank() != 0) as bar:
        for index, record in job.records(indices):
            if isinstance(record, Exception):
                wrong.append(failed(job.name(index), record, job.batch_size))
                continue
            records.append({"index": index, **record})
            writer.append(records[-1])
            bar.set_postfix_str(job.progress(records), refresh=False)
            bar.update()
            if ranks.rank() == 0:
                job.after_each(run)
    if wrong:
        raise wrong[0]


def longest_prompt(examples: Sequence[Encoded]) -> list[int]:
    """What is to be warmed up with."""
    return max((example.ids for example in examples), key=len)


def _examples_that_fit(
    generator: HuggingfaceLlamaGenerator, examples: list[Example], max_steps: int, chat: bool
) -> list[Encoded]:
    """The examples whose prompts leave room for an answer in the model's context; says how many do not."""
    room = context_length(generator.model.config) - 1
    if (window := sliding_window(generator.model.config)) is not None:
        room = min(room, window - max_steps)
        if room < 1:
            refuse(
                f"--max_steps {max_steps}: leaves no room for a prompt in the model's sliding window of "
                f"{window} positions, which prompt and answer share"
            )

    def encoded(prompt: str) -> list[int]:
        if not chat:
            return generator.encode(prompt)
        message = [{"role": "user", "content": prompt}]
        text = generator.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return generator.encode(text, special_tokens=False)  # the template has them

    try:
        fitting = [
            Encoded(example.prompt, example.reference, example.row, ids)
            for example in examples
            if not generator.is_far_too_long(example.prompt) and len(ids := encoded(example.prompt)) <= room
        ]
    except ValueError as error:
        refuse(str(error))
    if not fitting:
        refuse(f"every prompt has more than the {room} tokens that the model's context has room for")
    if (left_out := len(examples) - len(fitting)) and ranks.rank() == 0:
        what = f"{left_out} of {len(examples)} examples: prompts of more than {room} tokens"
        print(f"left out {what}", file=sys.stderr)
    return fitting
