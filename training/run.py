"""One training: flags of train.py -> a run's folder with log, checkpoints, scores of exits and the model."""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import datasets
import pandas
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback
from transformers.utils import logging

from arguments import ModelArguments, refuse
from data import DataError
from measures.plots import agreement_by_exit
from runs import ranks, records
from runs.failures import Failed, check_writable
from runs.records import Record, Run, heading
from self_speculation import LoadingError, load_model_and_tokenizer
from self_speculation.families import context_length
from self_speculation.loading.loading import load_config, resolve_device
from self_speculation.loading.sources import adapted_model
from training import from_flags
from training.flags import Flags
from training.progress import Progress, Stop
from training.texts import (
    Stream,
    Texts,
    is_stream,
    load_texts,
    padded,
    to_blocks,
    tokenizer_from_json,
    train_tokenizer,
)
from training.trainer import EXIT_SCORES, EarlyExitTrainer, newest_checkpoint, plain


def train(flags: Flags) -> int:
    """Train, print the scores of all exits and save the model; return the exit status."""
    if flags.model.threads is not None:
        torch.set_num_threads(flags.model.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of saving
    datasets.disable_progress_bars()
    try:
        run, trainer, evaluation = _set_up(flags)
    except (LoadingError, ValueError, Failed) as error:
        refuse(str(error) if str(error).startswith("--") else f"--{error}")
    except OSError as error:  # of the cache of datasets
        refuse(f"{error.filename or datasets.config.HF_DATASETS_CACHE}: {error.strerror}", status=1)
    trainer.add_callback(Progress(run))
    trainer.add_callback(stop := Stop())
    _, checkpoint = newest_checkpoint(run.folder)
    try:
        with stop.handle_signals():
            trainer.train(resume_from_checkpoint=checkpoint)
        if not stop.status:
            _save_and_show(run, trainer, trainer.evaluate(evaluation))
            ranks.barrier()  # no exchange may be under way when the process group is destroyed
            return 0
        reason = "interrupted"
    except KeyboardInterrupt:
        reason, stop.status = "interrupted", max(stop.status, 130)
    except FloatingPointError as error:
        reason, stop.status = f"{error}: begin anew with a lower --learning_rate", 1
    except (DataError, Failed, SafetensorError, OSError) as error:
        reason, stop.status = str(error), 1
        if ranks.rank() != 0:  # the first one may have no error, and wait for this one
            refuse(reason, stop.status)
    if bar := trainer.pop_callback(Progress).training_bar:
        bar.close()
    if ranks.rank() == 0:
        with suppress(Failed):
            run.write_status("interrupted" if stop.status > 1 else "failed")
        step, _ = newest_checkpoint(run.folder)
        kept = f"step {step} is kept" if step else "no checkpoint was written yet"
        go_on = f", go on with --resume {run.folder}" if step or stop.status > 1 else ""
        print(f"{reason}; {kept}{go_on}", file=sys.stderr)
    return stop.status


def _set_up(flags: Flags) -> tuple[Run, EarlyExitTrainer, datasets.Dataset]:
    """A new or resumed run, its trainer, and all held-out samples; quick checks come first.

    Raises:
        LoadingError, ValueError, Failed: something is missing, or flags do not fit.
    """
    model_args, shape, data_args, recipe_args, args = flags
    device = resolve_device(model_args.device)
    length, seed = data_args.sequence_length, model_args.seed
    config = None if model_args.model is None else _read_config(model_args, length)
    recipe_args.exit_layers(shape.num_layers if config is None else config.num_hidden_layers)
    from_flags.check_precision(model_args, device)
    # All ranks join before rank 0 does anything alone. gloo reduces offloaded gradients.
    backend = {"backend": "cuda:nccl,cpu:gloo"} if device.type == "cuda" and ranks.num_processes() > 1 else {}
    state = PartialState(cpu=device.type == "cpu", timeout=ranks.PATIENCE, **backend)
    place = ("resume", args.resume) if args.resume else ("output_dir", model_args.output_dir)
    ranks.share(lambda: check_writable(*place))
    with state.local_main_process_first():  # the others find its cached files
        texts = load_texts(data_args)
    run = ranks.share(partial(_open_run, flags))
    if config is None:
        trained = ranks.share(lambda: _new_tokenizer(run, texts[0], shape.vocabulary_size))
        tokenizer = tokenizer_from_json(trained, length)
        model = from_flags.new_llama(shape, tokenizer, length, seed)
    else:
        model, tokenizer = _load_model(flags, config)
    run.description |= records.describe_model(model_args.model or "a new Llama", model, device)
    run.description["computed_in"] = from_flags.computed_in(model_args.dtype, device)
    if args.lora_rank:
        assert model_args.model is not None
        model = from_flags.adapted(model, model_args.model, args.lora_rank)
    with state.local_main_process_first():
        training, evaluation = (to_blocks(part, tokenizer, length, seed) for part in texts)
    if is_stream(training):
        training = Stream(training)
        evaluation = datasets.Dataset.from_list([*evaluation.take(args.eval_samples)])
        if not len(evaluation):
            raise ValueError(f"eval_fraction {data_args.eval_fraction}: leaves no sample for evaluation")
    if ranks.rank() == 0:
        everything, learning = (model.num_parameters(only_trainable=only) / 1e6 for only in (False, True))
        samples = args.num_steps * _samples(run.description)
        epochs = "stream" if is_stream(texts[0]) else f"{samples / len(training):.2f} epochs"
        print(
            f"{everything:.1f} million parameters, {learning:.1f} million of them trainable; "
            f"{samples} training samples ({epochs}), {len(evaluation)} held out; {run.folder}"
        )
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
    return run, trainer, evaluation


def _read_config(model_args: ModelArguments, sequence_length: int) -> PretrainedConfig:
    """The config of --model; raises LoadingError, or ValueError if it does not fit."""
    assert model_args.model is not None
    config = load_config(model_args.model, model_args.loading_options())
    if sequence_length > (most := context_length(config)):
        raise ValueError(f"sequence_length {sequence_length}: must be at most {most}, the model's context")
    if config.num_hidden_layers < 2:
        raise ValueError(f"model {model_args.model}: has no layer to exit from before the last")
    return config


def _open_run(flags: Flags) -> Run:
    """The folder of this training; raises Failed."""
    resume = flags.optimization.resume
    description = records.describe("train", flags)
    earlier = description if resume is None else records.check_same_run(resume, description)
    if (now := _samples(description)) != (was := _samples(earlier)):
        raise Failed(
            f"--resume {resume}: a step of that run has {was} samples, this one's {now}: ranks, "
            f"--batch_size and --gradient_accumulation must make {was} together"
        )
    return Run.open(flags.model.output_dir, resume, description)


def _samples(description: Record) -> int:
    """Samples of a step."""
    arguments = description["arguments"]
    return description["num_ranks"] * arguments["batch_size"] * arguments["gradient_accumulation"]


def _new_tokenizer(run: Run, texts: Texts, vocabulary_size: int) -> str:
    """The JSON of a new model's tokenizer, which the first start of the run trains."""
    path = run.folder / "tokenizer.json"
    if not path.exists():
        run.replace(path.name, train_tokenizer(texts, vocabulary_size).to_str())
    return path.read_text(encoding="utf-8")


def _load_model(flags: Flags, config: PretrainedConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load --model on the CPU, in fp32 or, below an adapter, in --dtype."""
    model_args, rank = flags.model, flags.optimization.lora_rank
    assert model_args.model is not None
    if rank and adapted_model(model_args.model) is not None:
        raise ValueError(
            f"lora_rank {rank}: --model {model_args.model} is an adapter, and one on top of it would be of "
            "no use without it; take the model that has it merged"
        )
    if model_args.parallel == "fsdp":  # transformers then reads weights at the first rank only
        os.environ["ACCELERATE_USE_FSDP"] = os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    options = model_args.loading_options(
        dtype=model_args.dtype if rank else "float32",
        device="cpu",
        fuse=False,
        compile=False,
        parallel="data",
    )
    model, tokenizer = load_model_and_tokenizer(model_args.model, options, config)
    return model.requires_grad_(), tokenizer  # a merged adapter leaves frozen weights


def _save_and_show(run: Run, trainer: EarlyExitTrainer, metrics: dict[str, float]) -> None:
    """Write the model, its tokenizer, the scores of all exits and their plot; print the scores."""
    _save_model(trainer, run.folder)
    if ranks.rank() != 0:
        return
    columns = {name: [v for k, v in metrics.items() if f"_{name}_exit_" in k] for name in EXIT_SCORES}
    table = pandas.DataFrame({"exit_layer": range(1, len(columns["loss"]) + 1), **columns})
    run.replace("exits.csv", table.to_csv(index=False))
    asked = run.description["arguments"]
    title = heading(run.description | {"arguments": asked | {"dataset": asked["data_path"] or asked["data"]}})
    agreement_by_exit(table, asked["exits"] or (), title, run.folder / "exits")
    run.write_status("finished", metrics=metrics)
    print(f"{title}\n\n{table.to_string(index=False, float_format='{:.3f}'.format)}")
    print(f"perplexity {math.exp(metrics['eval_loss']):.2f} at the last layer")
    written = ("model", "adapter", "exits.csv", "exits.png", "exits.pdf", "log.csv", "run.json")
    print(f"\n{run.folder}/: {', '.join(name for name in written if (run.folder / name).exists())}")


def _save_model(trainer: EarlyExitTrainer, folder: Path) -> None:
    """Save `model` in bfloat16 with its tokenizer; beside it, `adapter`, which `model` contains."""
    is_first = ranks.rank() == 0

    def save(model: PreTrainedModel, name: str) -> None:
        weights = trainer.accelerator.get_state_dict(model)  # shards are gathered by all ranks
        if is_first:
            model.save_pretrained(folder / name, state_dict=weights)

    model = trainer.accelerator.unwrap_model(trainer.model)
    if plain(model) is not model:
        save(model, "adapter")
        model = model.merge_and_unload()
    save(model.to(torch.bfloat16), "model")
    if is_first:
        trainer.processing_class.save_pretrained(folder / "model")
