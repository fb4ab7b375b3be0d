"""Does something with each example once: over several ranks, interruptions and resumptions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from arguments import DataArguments, GenerationConfig, ModelArguments, refuse
from data import DataError, Example, fingerprint, load_examples
from runs import ranks
from runs.records import Record, RecordError, Run, check_destination, describe, describe_model, open_run
from runs.startup import load_generator, meet, model_name
from self_speculation import HuggingfaceLlamaGenerator
from self_speculation.model.decoder import context_length, is_lost_rank, sliding_window


def prepare(
    script: str, model_args: ModelArguments, config: GenerationConfig, data_args: DataArguments, args: Any
) -> tuple[HuggingfaceLlamaGenerator, list[Example], Callable[[], Run]]:
    """What a script over a dataset needs: the model, the examples that fit it, and how to open the run.

    What can be refused before the model is loaded is refused before.

    Args:
        args: the script's own, `resume` among them.
    """
    meet(model_args)
    try:
        examples = load_examples(data_args, model_args.seed)
        description = describe(script, (model_args, config, data_args, args), fingerprint(examples))
        check_destination(args.resume, model_args.output_dir, description)
    except (DataError, RecordError) as error:
        refuse(str(error))
    generator = load_generator(model_args, config)
    resume, output_dir = ranks.place_to_write(args.resume, model_args.output_dir)
    description |= describe_model(model_name(model_args), generator.model)
    return (
        generator,
        _examples_that_fit(generator, examples, config.max_steps),
        lambda: open_run(resume, output_dir, script, description),
    )


def run_examples(
    open_run: Callable[[], Run],
    num_examples: int,
    measure: Callable[[int], Record],
    progress: Callable[[Sequence[Record]], str],
    conclude: Callable[[Run, list[Record]], int],
    after_each: Callable[[Run], None] = lambda run: None,
    unit: str = "examples",
) -> int:
    """Make the records that are missing, each rank its share; then draw the conclusion, at rank 0.

    Args:
        open_run: makes or reopens the run's folder; called at rank 0 only.
        measure: the record of example i; it must depend on i and the flags alone, timings aside.
        progress: what the progress bar says of the records so far.
        conclude: what all records in order add up to; the exit status.
        after_each: called at rank 0 whenever it has written a record.
        unit: what an "example" is called.

    Returns:
        The exit status: 130 after Ctrl-C, 1 where records could not be written.
    """
    with ranks.process_group():
        try:
            run = ranks.share(open_run() if ranks.rank() == 0 else None)
        except RecordError as error:
            refuse(str(error))
        assert run is not None
        finished = ranks.share(run.records() if ranks.rank() == 0 else {})
        missing = [index for index in range(num_examples) if index not in finished]
        mine = missing[ranks.rank() :: ranks.world_size()]
        writer, records = run.writer(ranks.rank()), list(finished.values())

        def kept(reason: str) -> str:
            return (
                f"{reason}; {len(run.records())} of {num_examples} {unit} are kept, go on with "
                f"--resume {run.folder}"
            )

        try:
            with (
                ranks.last_words(lambda: kept("terminated, as when another rank is gone")),
                tqdm(mine, desc=unit, disable=ranks.rank() != 0) as bar,
            ):
                for index in bar:
                    records.append({"index": index, **measure(index)})
                    writer.append(records[-1])
                    bar.set_postfix_str(progress(records))
                    if ranks.rank() == 0:
                        after_each(run)
                ranks.barrier()
            if ranks.rank() != 0:
                return 0
            complete = run.records()
            return conclude(run, [complete[index] for index in range(num_examples)])
        except KeyboardInterrupt:
            print(kept("interrupted"), file=sys.stderr)
            return 130
        except (RecordError, FloatingPointError) as error:
            print(kept(str(error)), file=sys.stderr)
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            if ranks.is_first():
                print(kept("another rank is gone"), file=sys.stderr)
        return 1


def _examples_that_fit(
    generator: HuggingfaceLlamaGenerator, examples: list[Example], max_steps: int
) -> list[Example]:
    """The examples whose prompts leave room for an answer in the model's context; says how many do not."""
    room = context_length(generator.model.config) - 1
    if (window := sliding_window(generator.model.config)) is not None:
        room = min(room, window - max_steps)
    try:
        fitting = [
            example
            for example in examples
            if not generator.is_far_too_long(example.prompt) and len(generator.encode(example.prompt)) <= room
        ]
    except ValueError as error:
        refuse(str(error))
    if not fitting:
        refuse(f"every prompt has more than the {room} tokens that the model's context has room for")
    if len(fitting) < len(examples) and ranks.rank() == 0:
        number = len(examples) - len(fitting)
        print(
            f"left out {number} of {len(examples)} examples: prompts of more than {room} tokens",
            file=sys.stderr,
        )
    return fitting
