"""One training, from the flags of train.py to the model that it saves."""

from __future__ import annotations

import json
import math
import sys
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import pandas
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
)
from transformers.utils import logging

from arguments import ModelArguments, read_run, refuse
from measures.plots import curves_by_exit
from runs import ranks
from runs.heading import heading
from runs.records import (
    Record,
    RecordError,
    Run,
    check_same_run,
    check_writable,
    describe,
    describe_model,
)
from self_speculation import LoadingError, load_model_and_tokenizer
from self_speculation.model.families import attended_length
from self_speculation.model.loading import load_config, resolve_device
from self_speculation.model.sources import find_adapter
from training.flags import Flags
from training.from_flags import (
    adapted,
    advice_on_dtype,
    check_precision,
    computed_in,
    new_llama,
    shard_while_loading,
    trainer_settings,
)
from training.progress import Progress, Stop, newest_checkpoint, step_of
from training.texts import (
    Stream,
    Texts,
    fingerprint,
    is_stream,
    load_texts,
    named,
    padded,
    shuffled,
    to_blocks,
    train_tokenizer,
)
from training.trainer import EXIT_SCORES, CheckpointError, DivergedError, EarlyExitTrainer, plain


def train(flags: Flags) -> int:
    """Train by the flags of train.py, show the scores of all exits and save the model; the exit status."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of saving
    datasets.disable_progress_bars()
    try:
        start = _prepare(flags)
    except (LoadingError, ValueError, RecordError) as error:
        refuse(str(error) if str(error).startswith("--") else f"--{error}")
    except OSError as error:  # of the cache of datasets
        refuse(f"{error.filename or datasets.config.HF_DATASETS_CACHE}: {error.strerror}", status=1)
    stop = Stop()
    trainer = _trainer(flags, start, stop)
    try:
        with stop.listening():
            if start.checkpoint is not None and step_of(start.checkpoint) >= trainer.args.max_steps:
                trainer.restore(str(start.checkpoint))
            else:
                trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
            if stop.reason is None:
                metrics = trainer.evaluate(start.evaluation)
                _save_and_show(start, trainer, metrics)
    except DivergedError as error:
        texts = named(shuffled(start.texts, flags.model.seed), error.documents)
        stop.reason = f"{error}, of {texts}: look at them, or begin anew with a lower --learning_rate"
    except KeyboardInterrupt:
        stop.reason, stop.status = "interrupted", max(stop.status, 130)
    except (RecordError, CheckpointError, SafetensorError, OSError) as error:  # the latter two of the model
        stop.reason = str(error)
    if stop.reason is not None:
        if bar := trainer.pop_callback(Progress).training_bar:
            bar.close()
        return _ended_early(start.run, stop)
    ranks.barrier()  # after it, no exchange is under way, and the process group can be destroyed
    PartialState().destroy_process_group()
    return 0


def _ended_early(run: Run, stop: Stop) -> int:
    """Say why, and how to go on; the exit status."""
    if ranks.rank() == 0:
        with suppress(RecordError):
            run.say("interrupted" if stop.status > 1 else "failed")
        last = newest_checkpoint(run.folder)
        kept = f"step {step_of(last)} is kept" if last else "no checkpoint was written yet"
        go_on = f", go on with --resume {run.folder}" if last or stop.status > 1 else ""
        print(f"{stop.reason}; {kept}{go_on}", file=sys.stderr)
    return stop.status


@dataclass(frozen=True)
class Start:
    """What a training begins with."""

    run: Run
    device: torch.device
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: Texts  # to learn from
    training: Texts  # the same as blocks of ids
    evaluation: datasets.Dataset  # blocks held out
    checkpoint: Path | None  # to go on from


def _prepare(flags: Flags) -> Start:
    """Check, read and open everything, first what is refused quickly.

    Raises:
        LoadingError, ValueError, RecordError: something is not there, or does not fit the rest.
    """
    model_args, shape, data_args, recipe_args, args = flags
    device = resolve_device(model_args.device)
    config = None if model_args.model is None else _read_config(model_args, data_args.sequence_length)
    recipe_args.exit_layers(shape.num_layers if config is None else config.num_hidden_layers)
    check_precision(model_args, device)
    # All ranks join before rank 0 does anything alone, which the others then wait for. What is offloaded is
    # summed up by gloo.
    backend = {"backend": "cuda:nccl,cpu:gloo"} if device.type == "cuda" and ranks.num_processes() > 1 else {}
    PartialState(cpu=device.type == "cpu", timeout=ranks.PATIENCE, **backend)
    ranks.share(lambda: check_writable(args.resume, model_args.output_dir))
    texts = ranks.first_of_machine_first(lambda: load_texts(data_args))
    content = fingerprint(*texts)
    run = _open_run(flags, content)
    checkpoint = newest_checkpoint(run.folder)
    length = data_args.sequence_length
    if config is None:
        if checkpoint is not None:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        else:  # rank 0 trains one for all
            tokenizer = ranks.share(lambda: train_tokenizer(texts[0], shape.vocabulary_size, length))
        model = new_llama(shape, tokenizer, length, model_args.seed)
    else:
        model, tokenizer = _model_to_go_on_with(flags, config)
    run.description |= describe_model(model_args.model or "a new Llama", model, device)
    run.description["computed_in"] = computed_in(model_args.dtype, device)
    if args.lora_rank:
        assert model_args.model is not None
        model = adapted(model, model_args.model, args.lora_rank)
    training, evaluation = _blocks(flags, texts, content, tokenizer)
    if ranks.rank() == 0:
        print(_what_is_learnt(flags, model, texts, training, evaluation) + f"; {run.folder}")
        if (advice := advice_on_dtype(model_args.dtype, device)) is not None:
            print(advice, file=sys.stderr)
    return Start(run, device, model, tokenizer, texts[0], training, evaluation, checkpoint)


def _blocks(
    flags: Flags, texts: tuple[Texts, Texts], content: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Texts, datasets.Dataset]:
    """Tokenised once: later trainings, and the other ranks of this machine, map the same files."""
    length, seed = flags.data.sequence_length, flags.model.seed
    way = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    key = f"{content}-{zlib.crc32(way.encode()):08x}-{tokenizer.eos_token_id}-{length}-{seed}"
    folder = Path(datasets.config.HF_DATASETS_CACHE, "early_exit_blocks_1", key)

    def make() -> list[Texts]:
        folder.mkdir(parents=True, exist_ok=True)
        return [
            to_blocks(
                part, tokenizer, length, seed, None if is_stream(part) else str(folder / f"{name}.arrow")
            )
            for name, part in zip(("training", "evaluation"), texts, strict=True)
        ]

    blocks = ranks.first_of_machine_first(make)
    if is_stream(blocks[1]):
        held_out = list(islice(blocks[1], flags.optimization.eval_samples))
        if not held_out:
            raise ValueError(
                f"eval_fraction {flags.data.eval_fraction}: leaves not one sample for evaluation"
            )
        return Stream(blocks[0]), datasets.Dataset.from_list(held_out)
    return blocks[0], blocks[1]


def _what_is_learnt(
    flags: Flags, model: PreTrainedModel, texts: tuple[Texts, Texts], training: Texts, evaluation: Texts
) -> str:
    args = flags.optimization
    samples = args.num_steps * args.batch_size * args.gradient_accumulation * ranks.world_size()
    learning = sum(part.numel() for part in model.parameters() if part.requires_grad)
    parameters = f"{model.num_parameters() / 1e6:.1f} million parameters"
    if learning < model.num_parameters():
        parameters += f", {learning / 1e6:.1f} million of them learn"
    if is_stream(texts[0]):
        return f"{parameters}; {samples} samples of a stream to learn from, {len(evaluation)} held out"
    return (
        f"{parameters}; {len(texts[0])} texts, {len(training)} samples to learn from; {len(texts[1])} texts, "
        f"{len(evaluation)} samples held out; {samples / len(training):.2f} epochs"
    )


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

    def at_first_rank() -> Run:
        if resume is not None:
            check_same_run(resume, description, flags)
            if (now := _samples(description)) != (was := _samples(read_run(resume))):
                raise RecordError(
                    f"--resume {resume}: a step of that run has {was} samples, this one's {now}: ranks, "
                    f"--batch_size and --gradient_accumulation must make {was} together"
                )
            run = Run.resume(resume, description)
            run.say("running")  # it may be asked for more steps than before
            return run
        return Run.create(output_dir, "train", description)

    return ranks.share(at_first_rank)


def _samples(description: Record) -> int:
    """Of a step."""
    arguments = description["arguments"]
    return description["num_ranks"] * arguments["batch_size"] * arguments["gradient_accumulation"]


def _model_to_go_on_with(
    flags: Flags, config: PretrainedConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load it on the CPU; the trainer moves it, and loads the weights of a checkpoint itself.

    In fp32, or, where an adapter alone is trained, in what is computed in.
    """
    model_args, rank = flags.model, flags.optimization.lora_rank
    assert model_args.model is not None
    if rank and find_adapter(model_args.model) is not None:
        raise ValueError(
            f"lora_rank {rank}: --model {model_args.model} is an adapter, and one on top of it would be of "
            "no use without it; take the model that has it merged"
        )
    if model_args.parallel == "fsdp":
        shard_while_loading()
    dtype = model_args.dtype if rank else "float32"
    options = model_args.loading_options(
        dtype=dtype, device="cpu", fuse=False, compile=False, parallel="data"
    )
    model, tokenizer = load_model_and_tokenizer(model_args.model, options, config)
    return model.requires_grad_(), tokenizer  # what was merged with an adapter does not


def _trainer(flags: Flags, start: Start, stop: Stop) -> EarlyExitTrainer:
    model_args, _, _, recipe_args, args = flags
    trainer = EarlyExitTrainer(
        start.model,
        recipe_args,
        args=trainer_settings(args, model_args, start.run.folder, start.device),
        train_dataset=start.training,
        eval_dataset=start.evaluation.select(range(min(args.eval_samples, len(start.evaluation)))),
        data_collator=partial(padded, start.tokenizer.pad_token_id or 0),
        processing_class=start.tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(lambda table: start.run.replace("log.csv", table), stop))
    stop.follow(trainer)
    return trainer


def _save_and_show(start: Start, trainer: EarlyExitTrainer, metrics: dict[str, float]) -> None:
    """Write the model, its tokenizer, the scores of all exits and their plot; print those scores."""
    run = start.run
    _save_model(trainer, run.folder)
    if ranks.rank() != 0:
        return
    start.tokenizer.save_pretrained(run.folder / "model")
    columns = {name: [v for k, v in metrics.items() if f"_{name}_exit_" in k] for name in EXIT_SCORES}
    table = pandas.DataFrame({"exit_layer": range(1, len(columns["loss"]) + 1), **columns})
    run.replace("exits.csv", table.to_csv(index=False))
    title = heading(run.description)
    curves_by_exit(table, list(EXIT_SCORES), title, run.folder / "exits")
    run.say("finished", metrics=metrics)
    print(f"{title}\n\n{table.to_string(index=False, float_format='{:.3f}'.format)}")
    print(f"perplexity {math.exp(metrics['eval_loss']):.2f} at the last layer")
    written = ("model", "adapter", "exits.csv", "exits.png", "exits.pdf", "log.csv", "run.json")
    print(f"\n{run.folder}/: {', '.join(name for name in written if (run.folder / name).exists())}")


def _save_model(trainer: EarlyExitTrainer, folder: Path) -> None:
    """As an ordinary folder in bfloat16; an adapter beside the model that it is merged into."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    first = ranks.rank() == 0
    if not trainer.is_fsdp_enabled and not first:
        return
    if plain(model) is not model:
        weights = trainer.accelerator.get_state_dict(model) if trainer.is_fsdp_enabled else None
        if first:
            model.save_pretrained(folder / "adapter", state_dict=weights)
        model = model.merge_and_unload()
    model.to(torch.bfloat16)
    weights = trainer.accelerator.get_state_dict(model) if trainer.is_fsdp_enabled else None
    model.save_pretrained(folder / "model", state_dict=weights, is_main_process=first)
