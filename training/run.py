"""One training, from the flags of train.py to the model that it saves."""

from __future__ import annotations

import json
import math
import sys
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import datasets
import pandas
import torch
from accelerate import PartialState
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
)
from transformers.utils import logging

from arguments import ModelArguments, refuse
from measures.plots import curves_by_exit
from runs import ranks
from runs.heading import heading
from runs.records import RecordError, Run, check_destination, describe, describe_model, open_run
from self_speculation import LoadingError, load_model_and_tokenizer
from self_speculation.model.families import attended_length
from self_speculation.model.loading import load_config, resolve_device, resolve_dtype
from training.flags import Flags
from training.from_flags import check_precision, new_llama, trainer_settings
from training.progress import DivergedError, Progress, newest_checkpoint, step_of
from training.texts import load_texts, padded, to_blocks, train_tokenizer
from training.trainer import EXIT_SCORES, EarlyExitTrainer


def train(flags: Flags) -> int:
    """Train by the flags of train.py, show the scores of all exits and save the model; the exit status."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of saving
    datasets.disable_progress_bars()
    try:
        start = _prepare(flags)
    except (LoadingError, ValueError, RecordError) as error:
        refuse(str(error) if str(error).startswith("--") else f"--{error}")
    trainer = _trainer(flags, start)
    try:
        if start.checkpoint is not None and step_of(start.checkpoint) >= trainer.args.max_steps:
            trainer.restore(str(start.checkpoint))
        else:
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
        metrics = trainer.evaluate(start.evaluation)
        if trainer.is_world_process_zero():
            _save_and_show(start, trainer, metrics)
    except DivergedError as error:
        print(error, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, RecordError) as error:
        if isinstance(error, KeyboardInterrupt) and ranks.rank() == 0:
            with suppress(RecordError):
                start.run.say("interrupted")
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        last = newest_checkpoint(start.run.folder)
        kept = f"step {step_of(last)} is kept" if last else "no checkpoint was written yet"
        print(f"{reason}; {kept}, go on with --resume {start.run.folder}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    ranks.barrier()  # after it, no exchange is under way, and the process group can be destroyed
    PartialState().destroy_process_group()
    return 0


@dataclass(frozen=True)
class Start:
    """What a training begins with."""

    run: Run
    device: torch.device
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    exits: list[int]  # those that learn
    training: datasets.Dataset  # blocks of ids
    evaluation: datasets.Dataset
    checkpoint: Path | None  # to go on from


def _prepare(flags: Flags) -> Start:
    """Check, read and open everything, first what is refused quickly.

    Raises:
        LoadingError, ValueError, RecordError: something is not there, or does not fit the rest.
    """
    model_args, shape, data_args, recipe_args, args = flags
    device = resolve_device(model_args.device)
    config = None if model_args.model is None else _read_config(model_args, data_args.sequence_length)
    exits = recipe_args.exit_layers(shape.num_layers if config is None else config.num_hidden_layers)
    check_precision(model_args.dtype, device)
    # All ranks join before rank 0 does anything alone, which the others then wait for.
    PartialState(cpu=device.type == "cpu", timeout=ranks.PATIENCE)
    texts = load_texts(data_args)
    run = _open_run(flags, _fingerprint(*texts))
    checkpoint = newest_checkpoint(run.folder)
    length = data_args.sequence_length
    if config is None:
        if checkpoint is not None:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        else:  # rank 0 trains one for all
            first = ranks.rank() == 0
            tokenizer = ranks.share(
                train_tokenizer(texts[0], shape.vocabulary_size, length) if first else None
            )
        model = new_llama(shape, tokenizer, length, model_args.seed)
    else:
        model, tokenizer = _model_to_go_on_with(model_args, config)
    run.description |= describe_model(model_args.model or "a new Llama", model, device)
    if isinstance(mixed := resolve_dtype(model_args.dtype, device), torch.dtype):
        run.description["computed_in"] = str(mixed).removeprefix("torch.")
    training, evaluation = (to_blocks(part, tokenizer, length, model_args.seed) for part in texts)
    if ranks.rank() == 0:
        epochs = args.num_steps * args.batch_size * args.gradient_accumulation * ranks.world_size()
        print(
            f"{model.num_parameters() / 1e6:.1f} million parameters; {len(texts[0])} texts, {len(training)} "
            f"samples to learn from; {len(texts[1])} texts, {len(evaluation)} samples held out; "
            f"{epochs / len(training):.2f} epochs; {run.folder}"
        )
    return Start(run, device, model, tokenizer, exits, training, evaluation, checkpoint)


def _read_config(model_args: ModelArguments, sequence_length: int) -> PretrainedConfig:
    """The config of the model to go on with; raises LoadingError, or ValueError where it does not fit."""
    assert model_args.model is not None
    config = load_config(model_args.model, model_args.loading_options())
    if sequence_length > (most := attended_length(config)):
        raise ValueError(f"sequence_length {sequence_length}: must be at most {most}, the model's context")
    if config.num_hidden_layers < 2:
        raise ValueError(f"model {model_args.model}: has no layer to exit from before the last")
    return config


def _open_run(flags: Flags, fingerprint: str) -> Run:
    """The folder of this training, the same at every rank; raises RecordError."""
    output_dir, resume = flags.model.output_dir, flags.optimization.resume
    description = describe("train", flags, fingerprint)
    check_destination(resume, output_dir, description, flags)
    run = ranks.share(open_run(resume, output_dir, "train", description) if ranks.rank() == 0 else None)
    assert run is not None
    if resume is not None and ranks.rank() == 0:  # it may be asked for more steps than before
        run.say("running")
    return run


def _fingerprint(*parts: datasets.Dataset) -> str:
    checksum = 0
    for row in chain(*parts):
        checksum = zlib.crc32(json.dumps(row).encode(), checksum)
    return f"{checksum:08x}"


def _model_to_go_on_with(
    model_args: ModelArguments, config: PretrainedConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load it on the CPU in fp32; the trainer moves it, and loads the weights of a checkpoint itself."""
    assert model_args.model is not None
    options = model_args.loading_options(dtype="float32", device="cpu", fuse=False)
    return load_model_and_tokenizer(model_args.model, options, config)


def _trainer(flags: Flags, start: Start) -> EarlyExitTrainer:
    model_args, _, _, recipe_args, args = flags
    trainer = EarlyExitTrainer(
        start.model,
        replace(recipe_args, exits=start.exits),
        args=trainer_settings(args, model_args, start.run.folder, start.device),
        train_dataset=start.training,
        eval_dataset=start.evaluation.select(range(min(args.eval_samples, len(start.evaluation)))),
        data_collator=partial(padded, start.tokenizer.pad_token_id or 0),
        processing_class=start.tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(lambda table: start.run.replace("log.csv", table)))
    return trainer


def _save_and_show(start: Start, trainer: EarlyExitTrainer, metrics: dict[str, float]) -> None:
    """Write the model, its tokenizer, the scores of all exits and their plot; print those scores."""
    run = start.run
    model = trainer.accelerator.unwrap_model(trainer.model)
    del model.forward  # gives the loss of all exits; without it, the one of the class is back
    model.to(torch.bfloat16).save_pretrained(run.folder / "model")
    start.tokenizer.save_pretrained(run.folder / "model")
    columns = {name: [v for k, v in metrics.items() if f"_{name}_exit_" in k] for name in EXIT_SCORES}
    table = pandas.DataFrame({"exit_layer": range(1, model.config.num_hidden_layers + 1), **columns})
    run.replace("exits.csv", table.to_csv(index=False))
    title = heading(run.description)
    curves_by_exit(table, list(EXIT_SCORES), title, run.folder / "exits")
    run.say("finished", metrics=metrics)
    print(f"{title}\n\n{table.to_string(index=False, float_format='{:.3f}'.format)}")
    print(f"perplexity {math.exp(metrics['eval_loss']):.2f} at the last layer")
    print(f"\n{run.folder}/: model, exits.csv, exits.png, log.csv, run.json")
