"""Train by the LayerSkip recipe, layer dropout and early-exit loss: a new model or an existing one.

    python train.py --data python_stdlib --num_steps 3000
    python train.py --model ID --data_path "corpus/*.jsonl"
    torchrun --nproc_per_node 4 train.py --model ID --data_path pairs.jsonl --early_exit_scale 1.0
    torchrun --nproc_per_node 8 train.py --model ID --parallel fsdp --dtype bfloat16 --gradient_checkpointing
    python train.py --model ID --lora_rank 16 --dtype bfloat16 --data_path pairs.jsonl

Without --model, train a small new Llama and its tokenizer. Rows with `prompt` and `response` are for
finetuning: only responses have a loss. --dtype bfloat16, float16 or half is mixed precision: weights stay in
float32 until they are saved as bfloat16. Every script and transformers load the folder `model` of the result.

Ctrl-C and SIGTERM end a training after its step, with a checkpoint. --resume FOLDER continues it with the
same arguments, and with a higher --num_steps also a finished one.
"""

from __future__ import annotations

if __name__ == "__main__":
    import runs.early  # noqa: F401

import importlib.util
from collections.abc import Sequence
from importlib.metadata import version
from typing import get_type_hints

from arguments import parse, refuse
from runs import ranks
from runs.program import run
from training.flags import Flags


def main(argv: Sequence[str] | None = None) -> int:
    flags = Flags(*parse(__doc__ or "", *get_type_hints(Flags).values(), args=argv))
    model, rank = flags.model, flags.optimization.lora_rank
    if tuple(map(int, version("torch").split(".")[:2])) < (2, 13):
        refuse(f"torch {version('torch')}: training needs 2.13 or newer")
    if model.parallel not in ("data", "fsdp"):
        refuse(f"--parallel {model.parallel}: must be data or fsdp for training")
    for name, allowed in (("prefill_dtype", "auto"), ("quantization", "none")):
        if (value := getattr(model, name)) != allowed:
            refuse(f"--{name} {value}: must be {allowed} for training")
    if model.parallel == "fsdp" and ranks.num_processes() == 1:
        refuse("--parallel fsdp: needs two or more processes; start them by torchrun")
    if flags.optimization.offload and model.parallel != "fsdp":
        refuse("--offload True: is for --parallel fsdp")
    if rank and model.model is None:
        refuse(f"--lora_rank {rank}: needs a --model to adapt")
    if rank and importlib.util.find_spec("peft") is None:
        refuse(f"--lora_rank {rank}: needs peft: pip install -r requirements-lora.txt")
    kind, _, index = model.device.partition(":")
    if index:
        choice = f"; CUDA_VISIBLE_DEVICES={index} chooses the GPU" if kind == "cuda" else ""
        refuse(f"--device {model.device}: must be auto, cpu, cuda or mps{choice}")
    if model.model is None:
        try:
            flags.recipe.exit_layers(flags.shape.num_layers)
        except ValueError as error:
            refuse(f"--{error}")

    from training.run import train

    return train(flags)


if __name__ == "__main__":
    less = "--gradient_checkpointing, a smaller --batch_size, a lower --sequence_length, --lora_rank 16"
    run(main, less=f"{less}, --parallel fsdp")
