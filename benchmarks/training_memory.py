"""Peak memory of training, measured on a CPU in fp32, beside the estimates.

    python benchmarks/training_memory.py

Each measurement is a process of its own. The loss: 5 exits over 2,048 positions and the 128,256 tokens of
Llama 3, with narrow hidden states; with the logits of all exits together, and by `training.losses`.
Whole steps of a small Llama: all weights, sharded over two ranks (FSDP), and an adapter if peft is
installed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import ModelArguments
from benchmarks.estimates import memory
from benchmarks.synthetic import llama
from training.flags import OptimizationArguments, RecipeArguments
from training.from_flags import adapted, complete_sharding, trainer_settings
from training.losses import exit_losses
from training.texts import padded
from training.trainer import EarlyExitTrainer

_MIB = 2**20
SHAPE = (512, 1408, 12, 8, 4, 16384, False)  # see `llama`
BATCH, LENGTH, RANK = 2, 512, 8


def peak_since(before: float) -> float:
    """Peak MiB of this process above `before`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def resident() -> float:
    return psutil.Process().memory_info().rss / _MIB


def loss(way: str) -> float:
    head = nn.Linear(32, 128256, bias=False)
    states = torch.randn(5, 2048, 32, requires_grad=True)
    labels = torch.randint(128256, (2048,))
    before = resident()
    if way == "together":
        functional.cross_entropy(head(states).transpose(1, 2), labels.expand(5, -1)).backward()
    else:
        exit_losses(head, states, labels, way == "distill").sum().backward()
    return peak_since(before)


def steps(way: str) -> float:
    """Two steps of two passes."""
    before = resident()
    config = llama(*SHAPE)
    model = AutoModelForCausalLM.from_config(config)
    model = adapted(model, "", RANK) if way == "lora" else model
    with TemporaryDirectory() as folder:
        args = OptimizationArguments(
            num_steps=2, warmup_steps=0, batch_size=BATCH, gradient_accumulation=2, save_steps=9,
            gradient_checkpointing=way == "checkpointing",
        )  # fmt: skip
        settings = trainer_settings(args, ModelArguments(dtype="float32"), Path(folder), torch.device("cpu"))
        settings.save_strategy = settings.eval_strategy = "no"
        settings.disable_tqdm = True
        rows = [torch.randint(config.vocab_size, (LENGTH,)).tolist() for _ in range(16)]
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        recipe = RecipeArguments(layer_dropout=0, exits=[3, 6, 9], rotation=1)
        trainer = EarlyExitTrainer(
            model, recipe, settings, train_dataset=data, data_collator=lambda rows: padded(0, LENGTH, rows)
        )
        complete_sharding(trainer.accelerator, args, "float32")
        trainer.train()
    return peak_since(before)


def measured(*case: str) -> float:
    """Run a case in a process of its own; the larger one of two ranks counts."""
    # Return freed tensors to the system at once, so that resident memory is used memory.
    own = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2"}
    sharded = ["launch", "--config_file", "training/fsdp.yaml", "--num_processes", "2"]
    launcher = ["-m", "accelerate.commands.accelerate_cli", *sharded] if "fsdp" in case else []
    command = [sys.executable, *launcher, __file__, *case]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:  # out of memory
        return math.inf
    if done.returncode:
        sys.exit(done.stderr)
    return max(float(line) for line in done.stdout.splitlines() if line.replace(".", "").isdigit())


def main() -> None:
    if case := sys.argv[1:]:
        print(loss(case[1]) if case[0] == "loss" else steps(case[1]), flush=True)
        return
    print("peak of the loss, MiB: 5 exits, 2048 positions, 128256 tokens")
    for way in ("together", "label", "distill"):  # inf: more than this machine has
        print(f"{way:14}{measured('loss', way):10.0f}", flush=True)
    print(f"\npeak of a step, MiB: {SHAPE}, {BATCH} x {LENGTH} tokens, 4 exits\n{'':14}  measured  estimated")
    lora = ["lora"] if importlib.util.find_spec("peft") else []
    for way in ["full", "checkpointing", "fsdp", *lora]:
        estimate = memory(
            llama(*SHAPE), BATCH, LENGTH, 4, ranks=2 if way == "fsdp" else 1,
            lora_rank=RANK if way == "lora" else 0, checkpointing=way == "checkpointing",
            computed_in=torch.float32,
        )  # fmt: skip
        print(f"{way:14}{measured('steps', way):10.0f} {sum(estimate) / _MIB:10.0f}", flush=True)


if __name__ == "__main__":
    main()
