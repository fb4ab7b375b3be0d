"""Train by the LayerSkip recipe, layer dropout and early-exit loss: a new model or an existing one.

    python train.py --num_steps 3000
    python train.py --model ID --data_path "corpus/*.jsonl"
    torchrun --nproc_per_node 4 train.py --model ID --data_path pairs.jsonl --early_exit_scale 1.0
    accelerate launch --config_file training/fsdp.yaml --num_processes 8 train.py --model ID --dtype bfloat16
    python train.py --model ID --lora_rank 16 --dtype bfloat16 --data_path pairs.jsonl

Without --model, train a new Llama and a tokenizer; --model_args gives the shape in names of LlamaConfig:
vocab_size=2048,num_hidden_layers=16,hidden_size=256,intermediate_size=704,num_attention_heads=4,
num_key_value_heads=2. Rows with `prompt` and `response` are for finetuning: only responses have a loss.
--dtype bfloat16, float16 or half is mixed precision: weights stay in float32 until they are saved as
bfloat16. Every script and transformers load the folder `model` of the result.

Ctrl-C and SIGTERM end a training after the step, with a checkpoint. --resume FOLDER continues it with the
same arguments, and with a higher --num_steps also a finished one.
"""

import importlib.util
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import get_type_hints

from arguments import parse, refuse
from runs import ranks
from runs.failures import check_folder
from runs.flags import check_device, num_layers
from runs.program import run
from training.flags import Flags, is_sharded


def main(argv: Sequence[str] | None = None) -> int:
    groups = get_type_hints(Flags).values()
    unused = ("quantization", "compile")
    flags = Flags(*parse(__doc__ or "", *groups, args=argv, without=unused))
    model = flags.model
    rank = flags.optimization.lora_rank
    if tuple(map(int, version("torch").split(".")[:2])) < (2, 13):
        refuse(f"torch {version('torch')}: training needs 2.13 or newer")
    if is_sharded():
        if os.environ.get("FSDP_VERSION") != "2":
            refuse("accelerate's config: fsdp_version must be 2, as in training/fsdp.yaml")
        if ranks.num_processes() == 1:
            refuse("FSDP: needs two or more processes, by accelerate launch --num_processes N")
    if rank and model.model is None:
        refuse(f"--lora_rank {rank}: needs a --model to adapt")
    if rank and importlib.util.find_spec("peft") is None:
        refuse(f"--lora_rank {rank}: needs peft: pip install -r requirements-lora.txt")
    kind, _, index = model.device.partition(":")
    if index or kind == "split":
        choice = f"; CUDA_VISIBLE_DEVICES={index} chooses the GPU" if kind == "cuda" else ""
        refuse(f"--device {model.device}: must be auto, cpu, cuda or mps{choice}")
    check_device(model.device)
    if model.model is not None:
        num_layers(model)
    check_folder(model.output_dir, flags.optimization.resume)

    from training.run import train

    return train(flags)


if __name__ == "__main__":
    less = "--gradient_checkpointing, a smaller --batch_size, a lower --sequence_length, --lora_rank 16"
    run(main, less=f"{less}, FSDP")
