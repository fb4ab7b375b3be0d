"""Train by the LayerSkip recipe, layer dropout and early-exit loss: a new model or one that exists.

    python train.py --data python_stdlib --num_steps 3000
    python train.py --model ID --data_path "corpus/*.jsonl"
    torchrun --nproc_per_node 4 train.py --model ID --data_path pairs.jsonl --early_exit_scale 1.0
    torchrun --nproc_per_node 8 train.py --model ID --parallel fsdp --dtype bfloat16 --gradient_checkpointing
    python train.py --model ID --lora_rank 16 --dtype bfloat16 --data_path pairs.jsonl

Without --model a small Llama is made, with a tokenizer of its own. Rows with `prompt` and `response` are for
finetuning: only the responses are learnt. --dtype bfloat16, float16 or half is mixed precision: the weights
stay float32 until they are saved as bfloat16. The folder `model` that it writes in the end can be loaded by
every script, and by transformers.

Ctrl-C, SIGTERM and a full disk end a training after its step, with a checkpoint. --resume FOLDER goes on with
it by the arguments that it had; with a higher --num_steps, also with one that is finished.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import get_type_hints

from arguments import parse, refuse
from runs import ranks
from runs.program import run
from training.flags import Flags


def main(argv: Sequence[str] | None = None) -> int:
    flags = Flags(*parse(__doc__ or "", *get_type_hints(Flags).values(), args=argv))
    for name, known in (("parallel", ("data", "fsdp")), ("quantization", ("none",))):
        if (value := getattr(flags.model, name)) not in known:
            refuse(f"--{name} {value}: training knows {' and '.join(known)} only")
    if flags.model.parallel == "fsdp" and ranks.num_processes() == 1:
        refuse("--parallel fsdp: shares a model out between processes; start two or more by torchrun")
    if flags.optimization.offload and flags.model.parallel != "fsdp":
        refuse("--offload True: is for --parallel fsdp")
    if (rank := flags.optimization.lora_rank) and flags.model.model is None:
        refuse(f"--lora_rank {rank}: needs a --model to adapt")
    if rank and importlib.util.find_spec("peft") is None:
        refuse(f"--lora_rank {rank}: needs peft: pip install -r requirements-lora.txt")
    if ":" in flags.model.device:
        kind, _, index = flags.model.device.partition(":")
        which = f"; CUDA_VISIBLE_DEVICES={index} chooses the GPU" if kind == "cuda" else ""
        refuse(f"--device {flags.model.device}: must be auto, cpu, cuda or mps{which}")
    if flags.model.model is None:
        try:
            flags.recipe.exit_layers(flags.shape.num_layers)
        except ValueError as error:
            refuse(f"--{error}")

    from training.run import train

    return train(flags)


if __name__ == "__main__":
    less = "--gradient_checkpointing, a smaller --batch_size, a lower --sequence_length, --lora_rank 16"
    run(main, less=f"{less}, --parallel fsdp")
