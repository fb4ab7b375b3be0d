"""One training: flags of train.py -> a run's folder with log, checkpoints, scores of exits and the model."""

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import datasets
import pandas
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback
from transformers.utils import logging

from arguments import ModelArguments, refuse
from data import DataError, one_line
from runs import ranks
from runs.description import Record, counted, describe, describe_model, heading
from runs.failures import Failed
from runs.program import enable_collector
from runs.records import Run, check_same_run, write_atomically
from runs.startup import set_threads
from self_speculation import LoadingError, ThreadGovernor, load_model_and_tokenizer
from self_speculation.loading.loading import load_config, resolve_device
from self_speculation.loading.sources import adapted_model
from self_speculation.models.families import context_length
from training import from_flags
from training.flags import Flags, is_sharded
from training.progress import Progress, Stop, Threads
from training.texts import (
    load_texts,
    loss_by_frequency,
    padded,
    to_blocks,
    tokenizer_from_json,
    train_tokenizer,
)
from training.trainer import EXIT_SCORES, EarlyExitTrainer, newest_checkpoint, plain

_TIMED = 5  # batches; the first one prepares what later ones find
# A last layer that has learnt something has at most this share of the loss by frequencies: layers that all
# predict one token had 0.998 to 1.03, layers that learnt as long from labels 0.88.
_LEARNT = 0.95
_COLLAPSED = "agreement then says\nlittle, see docs/training.md#when-all-layers-predict-one-token"


def train(flags: Flags) -> int:
    """Train, print the scores of all exits and save the model; return the exit status."""
    governor = set_threads(flags.model.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of saving
    datasets.disable_progress_bars()
    try:
        run, trainer = _set_up(flags, governor)
    except (DataError, Failed) as error:
        refuse(str(error))
    except (LoadingError, ValueError) as error:  # the message starts with a field
        refuse(f"--{error}")
    except OSError as error:  # of the cache of datasets
        place = error.filename or datasets.config.HF_DATASETS_CACHE
        refuse(f"{place}: {error.strerror or one_line(error)}", status=1)
    enable_collector()
    trainer.add_callback(Progress(run))
    trainer.add_callback(Threads(governor))
    trainer.add_callback(stop := Stop())
    _, checkpoint = newest_checkpoint(run.folder)
    try:
        with stop.handle_signals():
            trainer.train(resume_from_checkpoint=checkpoint)
        if not stop.status:
            _save_model(trainer, run.folder)
            _show(run, trainer, trainer.evaluate())
            ranks.barrier()  # no exchange may be under way when the process group is destroyed
            return 0
        reason = "interrupted"
    except KeyboardInterrupt:
        reason = "interrupted"
        stop.status = max(stop.status, 130)
    except (FloatingPointError, Failed, SafetensorError, OSError) as error:
        reason = str(error)
        stop.status = 1
        if not ranks.is_first():  # the first one may have no error, and wait for this one
            refuse(reason, stop.status)
    if bar := trainer.pop_callback(Progress).training_bar:
        bar.close()
    if ranks.is_first():
        with suppress(Failed):
            run.write_status("interrupted" if stop.status > 1 else "failed")
        step, _ = newest_checkpoint(run.folder)
        kept = f"step {step} is kept" if step else "no checkpoint was written yet"
        go_on = f", go on with {run.resume_command}" if step or stop.status > 1 else ""
        print(f"{reason}; {kept}{go_on}", file=sys.stderr)
    return stop.status


def _set_up(flags: Flags, governor: ThreadGovernor) -> tuple[Run, EarlyExitTrainer]:
    """A new or resumed run, and the trainer; quick checks come first.

    Raises:
        LoadingError, ValueError, Failed: something is missing, or flags do not fit.
    """
    model_args, data_args, recipe_args, args = flags
    device = resolve_device(model_args.device)
    length = data_args.sequence_length
    seed = model_args.seed
    config = _read_config(model_args, length)
    exits = recipe_args.exit_layers(config.num_hidden_layers)
    computed_in = str(from_flags.computed_in(model_args.dtype, device)).removeprefix("torch.")
    # All ranks join before rank 0 does anything alone.
    state = PartialState(cpu=device.type == "cpu", timeout=ranks.PATIENCE)
    description = ranks.share(partial(_describe, flags))
    with state.local_main_process_first():  # other processes find cached files
        texts = load_texts(data_args)
    trained = None
    if model_args.model is None:
        trained = ranks.share(lambda: _new_tokenizer(args.resume, texts[0], config.vocab_size))
        tokenizer = tokenizer_from_json(trained, length)
        model = from_flags.new_llama(config, tokenizer, seed)
    else:
        model, tokenizer = _load_model(flags, config)
    facts = describe_model(model_args.model or "a new Llama", model, device)
    facts |= {"computed_in": computed_in, "prompts_computed_in": computed_in}
    if args.lora_rank:
        model = from_flags.adapted(model, model_args.model_name, args.lora_rank)
    with state.local_main_process_first():
        training, evaluation = (to_blocks(split, tokenizer, length, seed) for split in texts)
    # Not earlier, so that Ctrl-C leaves no empty folder.
    run = ranks.share(lambda: Run.open(model_args.output_dir, args.resume, description))
    run.description |= facts
    if ranks.is_first() and trained is not None:
        write_atomically(run.folder / "tokenizer.json", trained)
    trainer = EarlyExitTrainer(
        model,
        recipe_args,
        args=from_flags.trainer_settings(args, model_args, run.folder, device),
        train_dataset=training,
        eval_dataset=evaluation.select(range(min(args.eval_samples, len(evaluation)))),
        data_collator=partial(padded, tokenizer.pad_token_id or 0, length),
        processing_class=tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    step, checkpoint = newest_checkpoint(run.folder)
    trainer.args.eval_on_start = checkpoint is None
    if ranks.is_first():
        everything, learning = (model.num_parameters(only_trainable=only) / 1e6 for only in (False, True))
        samples = args.num_steps * _samples(description)
        print(
            f"{everything:.1f} million parameters, {learning:.1f} million of them trainable; {samples} "
            f"samples ({samples / len(training):.2f} epochs); {_held_out(trainer, step, governor)}; "
            f"{run.folder}"
        )
        if 1 in exits and recipe_args.exit_loss == "label":
            unequal = "its weight in the paper's loss is 0; --exit_loss distill gives all exits the same"
            print(f"exit 1 never learns: {unequal}")
    from_flags.complete_sharding(trainer.accelerator, args, model_args.dtype)
    return run, trainer


def _held_out(trainer: EarlyExitTrainer, step: int, governor: ThreadGovernor) -> str:
    """How often held-out losses are computed after this step, and how long that takes by a few batches."""
    args = trainer.args
    number = len(trainer.eval_dataset)
    between = max(0, (args.max_steps - 1) // int(args.eval_steps) - step // int(args.eval_steps))
    times = args.eval_on_start + between + 1
    text = f"losses of {number} held-out samples are computed {counted(times, 'time')}"
    if is_sharded():  # shards are made later, and the whole model may not fit
        return text
    size = args.per_device_eval_batch_size
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(min(size, number))])
    ends = []
    for _ in range(_TIMED):
        governor.adjust()
        trainer.prediction_step(trainer.model, batch)[1].sum().item()  # waits for a GPU
        ends.append(perf_counter())
    least = min(end - start for start, end in pairwise(ends))  # other programs may disturb some
    seconds = times * math.ceil(number / size / args.world_size) * least
    return f"{text}, which takes about {seconds:.0f} s"


def _read_config(model_args: ModelArguments, sequence_length: int) -> PretrainedConfig:
    """The config of --model or of a new one; raises LoadingError, or ValueError if it does not fit."""
    if model_args.model is None:
        return from_flags.new_config(model_args, sequence_length)
    config = load_config(model_args.model, model_args.loading_options())
    if sequence_length > (most := context_length(config)):
        raise ValueError(f"sequence_length {sequence_length}: must be at most {most}, the model's context")
    return config


def _describe(flags: Flags) -> Record:
    """The description of this training; raises Failed if --resume names another training."""
    resume = flags.optimization.resume
    description = describe("train", flags)
    if resume is None:
        return description
    earlier = check_same_run(resume, description)
    _, checkpoint = newest_checkpoint(Path(resume).expanduser())
    if checkpoint is not None:
        was_sharded = any(Path(checkpoint).glob("pytorch_model_fsdp*"))
        if was_sharded != is_sharded():
            how = "with" if was_sharded else "without"
            raise Failed(f"--resume {resume}: trained {how} FSDP, start it {how} FSDP (accelerate launch)")
    if (now := _samples(description)) != (was := _samples(earlier)):
        raise Failed(
            f"--resume {resume}: a step of that run has {was} samples, this one's {now}: ranks, "
            f"--batch_size and --gradient_accumulation must make {was} together"
        )
    return description


def _samples(description: Record) -> int:
    """Samples of a step."""
    arguments = description["arguments"]
    return description["num_ranks"] * arguments["batch_size"] * arguments["gradient_accumulation"]


def _new_tokenizer(resume: str | None, texts: datasets.Dataset, vocabulary_size: int) -> str:
    """The JSON of a new model's tokenizer, which the first start of the run trains."""
    if resume is not None:
        return (Path(resume).expanduser() / "tokenizer.json").read_text(encoding="utf-8")
    return train_tokenizer(texts, vocabulary_size)


def _load_model(flags: Flags, config: PretrainedConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load --model on the CPU, in fp32 or, below an adapter, in --dtype."""
    model_args = flags.model
    rank = flags.optimization.lora_rank
    name = flags.model.model_name
    if rank and adapted_model(name) is not None:
        raise ValueError(f"lora_rank {rank}: --model {name} is an adapter, take the merged model")
    options = model_args.loading_options(
        dtype=model_args.dtype if rank else "float32", device="cpu", fuse=False, compile=False
    )
    model, tokenizer = load_model_and_tokenizer(name, options, config)
    return model.requires_grad_(), tokenizer  # a merged adapter leaves frozen weights


def _show(run: Run, trainer: EarlyExitTrainer, metrics: dict[str, float]) -> None:
    """Write and print the scores of all exits, and a warning if the last layer has learnt nothing that exits
    could agree on.
    """
    if not ranks.is_first():
        return
    columns = {name: [v for k, v in metrics.items() if f"_{name}_exit_" in k] for name in EXIT_SCORES}
    table = pandas.DataFrame({"exit_layer": range(1, len(columns["loss"]) + 1), **columns})
    write_atomically(run.folder / "exits.csv", table.to_csv(index=False))
    asked = run.description["arguments"]
    texts = asked["data_path"] or "the standard library"
    title = heading(run.description | {"arguments": asked | {"dataset": texts}})
    run.write_status("finished", metrics=metrics)
    print(f"{title}\n\n{table.to_string(index=False, float_format='{:.3f}'.format)}")
    loss = metrics["eval_loss"]
    start = next(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    by_frequency = loss_by_frequency(trainer.eval_dataset["labels"])
    print(f"perplexity {math.exp(loss):.2f} at the last layer")
    alone = f"{by_frequency:.3f} by frequencies of tokens alone"
    print(f"its loss: {start:.3f} at the start, {loss:.3f} now; {alone}")
    if loss > start or loss > _LEARNT * by_frequency:
        why = "loss rose" if loss > start else "predictions are hardly better than frequencies of tokens"
        print(f"warning: the last layer's {why}; {_COLLAPSED}")
    print(f"\n{run.listing()}")


def _save_model(trainer: EarlyExitTrainer, folder: Path) -> None:
    """Save `model` in bfloat16 with the tokenizer; beside it, `adapter`, which `model` contains. Rounds the
    trainer's model, which then is the saved one.
    """
    is_first = ranks.is_first()

    def save(model: PreTrainedModel, name: str) -> None:
        weights = trainer.accelerator.get_state_dict(model)  # shards are gathered by all ranks
        if is_first:
            with _replaced(folder / name) as partial:
                model.save_pretrained(partial, state_dict=weights)
                if name == "model":
                    trainer.processing_class.save_pretrained(partial)

    model = trainer.accelerator.unwrap_model(trainer.model)
    if plain(model) is not model:
        save(model, "adapter")
        model = model.merge_and_unload()
    dtype = model.dtype
    save(model.to(torch.bfloat16), "model")
    model.to(dtype)  # with the bits of the saved one, for the last evaluation


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when the block ends. Raises Failed if a file
    cannot be written; `folder` then stays as it is.
    """
    partial = folder.with_suffix(".partial")
    earlier = folder.with_suffix(".earlier")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(earlier, ignore_errors=True)
            folder.rename(earlier)
        partial.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise Failed(f"cannot write {folder}: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
