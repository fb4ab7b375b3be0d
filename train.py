"""The LayerSkip recipe: layer dropout and early-exit loss, for a new model or one to go on with.

    python train.py --data python_stdlib --num_steps 3000
    python train.py --model ID --data_path "corpus/*.jsonl"
    torchrun --nproc_per_node 4 train.py --model ID --data_path pairs.jsonl --early_exit_scale 1.0

Without --model a small Llama is made, with a tokenizer of its own. Rows with `prompt` and `response` are for
finetuning: only responses are learnt. --dtype bfloat16, float16 or half is mixed precision: the weights stay
float32 until they are saved as bfloat16. The folder `model` that it ends with is for every script, and for
transformers.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # for the seconds that the imports take

import json
import math
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pandas
import torch
from accelerate import PartialState
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from arguments import (
    ModelArguments,
    NewModelArguments,
    OptimizationArguments,
    RecipeArguments,
    TrainingDataArguments,
    parse,
    refuse,
)
from data import DataError
from measures.plots import curves_by_exit
from runs import ranks
from runs.records import RecordError, Run, check_destination, describe, describe_model, open_run
from runs.startup import run
from self_speculation import LoadingError, load_model_and_tokenizer
from self_speculation.model.decoder import attended_length
from self_speculation.model.loading import as_if_never_quantized, load_config, resolve_device, resolve_dtype
from training.texts import Padding, load_texts, to_blocks, train_tokenizer
from training.trainer import EXIT_SCORES, EarlyExitTrainer, Recipe


def main(argv: Sequence[str] | None = None) -> int:
    groups = (
        ModelArguments,
        NewModelArguments,
        TrainingDataArguments,
        RecipeArguments,
        OptimizationArguments,
    )
    arguments = parse(__doc__ or "", *groups, args=argv)
    model_args, shape, data_args, recipe_args, args = arguments
    for name, value, only in (
        ("parallel", model_args.parallel, "data"),
        ("quantization", model_args.quantization, "none"),
    ):
        if value != only:
            refuse(f"--{name} {value}: training knows {only} only")
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of saving
    datasets.disable_progress_bars()
    try:
        device = resolve_device(model_args.device)
        exits = recipe_args.exit_layers(_check_model(model_args, shape, data_args))
        _check_precision(model_args, device)
        # The ranks meet before anything that only one of them does.
        PartialState(cpu=device.type == "cpu", timeout=ranks.PATIENCE)
        training, evaluation = load_texts(data_args)
        description = describe("train", arguments, _fingerprint(training, evaluation))
        description["num_ranks"] = ranks.world_size()
        check_destination(args.resume, model_args.output_dir, description)
        run = ranks.share(
            open_run(args.resume, model_args.output_dir, "train", description) if ranks.rank() == 0 else None
        )
        assert run is not None
        checkpoint = _newest_checkpoint(run.folder)
        model, tokenizer = _model_and_tokenizer(model_args, shape, data_args, training, checkpoint)
        run.description |= describe_model(model_args.model or "a new Llama", model)
        blocks = [
            to_blocks(part, tokenizer, data_args.sequence_length, model_args.seed)
            for part in (training, evaluation)
        ]
    except (LoadingError, ValueError, DataError, RecordError) as error:
        refuse(str(error) if str(error).startswith("--") else f"--{error}")
    if ranks.rank() == 0:
        print(
            f"{model.num_parameters() / 1e6:.1f} million parameters; {len(training)} texts, {len(blocks[0])} "
            f"samples to learn from; {len(evaluation)} texts, {len(blocks[1])} samples held out; "
            f"{args.num_steps * _samples_per_step(args) / len(blocks[0]):.2f} epochs; {run.folder}"
        )
    settings = Recipe(
        **{**asdict(recipe_args), "exits": exits}, num_steps=args.num_steps, seed=model_args.seed
    )
    trainer = EarlyExitTrainer(
        model,
        settings,
        args=_training_arguments(args, model_args, run.folder, device),
        train_dataset=blocks[0],
        eval_dataset=blocks[1].select(range(min(args.eval_samples, len(blocks[1])))),
        data_collator=Padding(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0),
        processing_class=tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(run))
    try:
        if checkpoint is not None and _step(checkpoint) >= args.num_steps:
            trainer.restore(str(checkpoint))
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        metrics = trainer.evaluate(blocks[1])
        if trainer.is_world_process_zero():
            _save(run, trainer, tokenizer, metrics)
    except DivergedError as error:
        print(error, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, RecordError) as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        last = _newest_checkpoint(run.folder)
        kept = f"step {_step(last)} is kept" if last else "no checkpoint was written yet"
        print(f"{reason}; {kept}, go on with --resume {run.folder}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    # Not before the last gather is over everywhere: a rank that leaves with its tensors waits for itself.
    ranks.barrier()
    PartialState().destroy_process_group()
    return 0


def _check_model(
    model_args: ModelArguments, shape: NewModelArguments, data_args: TrainingDataArguments
) -> int:
    """Number of layers; raises LoadingError or ValueError where the model does not fit the rest."""
    if model_args.model is None:
        return shape.num_layers
    config = load_config(model_args.model, model_args.loading_options())
    if data_args.sequence_length > (most := attended_length(config)):
        raise ValueError(
            f"sequence_length {data_args.sequence_length}: must be at most {most}, the model's context"
        )
    if config.num_hidden_layers < 2:
        raise ValueError(f"model {model_args.model}: has no layer to exit from before the last")
    return config.num_hidden_layers


def _check_precision(model_args: ModelArguments, device: torch.device) -> None:
    """Raises ValueError where there is no such mixed precision, or no choosing of a GPU."""
    if model_args.dtype == "float16" and device.type == "cpu":
        raise ValueError("dtype float16: mixed precision on a CPU is bfloat16")
    if model_args.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("dtype bfloat16: this GPU has only float16")
    if ":" in model_args.device:
        raise ValueError(
            f"device {model_args.device}: must be cuda, the GPU of this rank, or cpu, mps or auto"
        )


def _fingerprint(*parts: datasets.Dataset) -> str:
    checksum = 0
    for part in parts:
        for row in part:
            checksum = zlib.crc32(json.dumps(row).encode(), checksum)
    return f"{checksum:08x}"


def _newest_checkpoint(folder: Path) -> Path | None:
    """The last one that was written to its end: the trainer's state comes last."""
    complete = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError):
            json.loads(state.read_text())
            complete.append(state.parent)
    return max(complete, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _model_and_tokenizer(
    model_args: ModelArguments,
    shape: NewModelArguments,
    data_args: TrainingDataArguments,
    training: datasets.Dataset,
    checkpoint: Path | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What training starts from; where it goes on, the trainer loads the weights."""
    if model_args.model is not None:
        options = model_args.loading_options(dtype="float32", device="cpu", fuse=False)
        model, tokenizer = load_model_and_tokenizer(model_args.model, options)
        return (as_if_never_quantized(model) if model_args.model.endswith(".gguf") else model), tokenizer
    if checkpoint is not None:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    else:
        trained = None
        if ranks.rank() == 0:
            trained = train_tokenizer(training, shape.vocabulary_size, data_args.sequence_length)
        tokenizer = ranks.share(trained)
    config = LlamaConfig(
        vocab_size=shape.vocabulary_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=data_args.sequence_length,
        tie_word_embeddings=True,
        # Keeps the size of what goes through; 0.02 is for wide models.
        initializer_range=shape.hidden_size**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # its embedding would stay zero, and it is the end of a text here
    )
    set_seed(model_args.seed)
    return LlamaForCausalLM(config), tokenizer


def _samples_per_step(args: OptimizationArguments) -> int:
    return args.batch_size * args.gradient_accumulation * ranks.world_size()


def _training_arguments(
    args: OptimizationArguments, model_args: ModelArguments, folder: Path, device: torch.device
) -> TrainingArguments:
    mixed = resolve_dtype(model_args.dtype, device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=device.type == "cpu",
        bf16=mixed == torch.bfloat16,
        fp16=mixed == torch.float16,
        seed=model_args.seed,
        max_steps=args.num_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        activation_checkpointing=args.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        adam_beta2=0.95,
        logging_steps=args.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        save_steps=args.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,  # they are what the loss takes
        ddp_find_unused_parameters=True,  # a layer that all samples skip
        report_to="none",
        disable_tqdm=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several are for torchrun, not for DataParallel
    return arguments


class DivergedError(Exception):
    """The loss is no longer a number."""


class Progress(ProgressCallback):
    """A bar with the loss, a line for each evaluation, and log.csv."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if control.should_save:  # a loss that is averaged over a checkpoint would be lost with a kill
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        for name, value in logs.items():
            if "loss" in name and not math.isfinite(float(value)):
                raise DivergedError(f"{name} is {value} at step {state.global_step}; lower --learning_rate")
        if not state.is_world_process_zero:
            return
        # Without the trainer's own summary, which tells of the time since a resumption only.
        table = pandas.DataFrame([row for row in state.log_history if "train_runtime" not in row])
        # In an order that does not change with a resumption.
        table = table[sorted(table, key=lambda name: (name != "step", len(name), name))]
        self._run.replace("log.csv", table.to_csv(index=False))
        if self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")
        if "eval_loss" in logs:
            exits = sum(key.startswith("eval_loss_exit_") for key in logs)
            shown = sorted({exits * part // 8 for part in (1, 2, 4, 8)} - {0})
            losses = ", ".join(f"exit {exit} {logs[f'eval_loss_exit_{exit}']:.3f}" for exit in shown)
            self.training_bar.write(f"step {state.global_step}: held-out loss {losses}")


def _save(
    run: Run, trainer: EarlyExitTrainer, tokenizer: PreTrainedTokenizerBase, metrics: dict[str, float]
) -> None:
    """The model, the table and the plot."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    del model.forward  # the loss of all exits; the class has the model's own
    model.to(torch.bfloat16).save_pretrained(run.folder / "model")
    tokenizer.save_pretrained(run.folder / "model")
    columns = {name: [v for k, v in metrics.items() if f"_{name}_exit_" in k] for name in EXIT_SCORES}
    table = pandas.DataFrame({"exit_layer": range(1, model.config.num_hidden_layers + 1), **columns})
    run.replace("exits.csv", table.to_csv(index=False))
    curves_by_exit({"": table}, list(EXIT_SCORES), run.folder / "exits")
    run.write("run.json", {**run.description, "status": "finished", "metrics": metrics})
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(f"perplexity {math.exp(metrics['eval_loss']):.2f} at the last layer")
    print(f"\n{run.folder}/: model, exits.csv, exits.png, log.csv, run.json")


if __name__ == "__main__":
    run(main)
