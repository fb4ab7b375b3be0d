"""What the flags of train.py become: a new Llama, and the settings of the trainer of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers import TrainingArguments as TrainerSettings

from arguments import ModelArguments
from self_speculation.model.loading import resolve_dtype
from training.flags import NewModelArguments, OptimizationArguments


def new_llama(
    shape: NewModelArguments, tokenizer: PreTrainedTokenizerBase, context: int, seed: int
) -> PreTrainedModel:
    """A Llama with random weights in fp32, for sequences of at most `context` tokens."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary_size, hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        intermediate_size=shape.intermediate_size, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, max_position_embeddings=context, tie_word_embeddings=True,
        # So that a layer's output is as large as its input; the usual 0.02 does this for wide models only.
        initializer_range=shape.hidden_size**-0.5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # it is the end of a text here, and its embedding would stay zero
    )  # fmt: skip
    set_seed(seed)
    return LlamaForCausalLM(config)


def check_precision(dtype: str, device: torch.device) -> None:
    """Raises ValueError where the device has no mixed precision of this kind."""
    if dtype == "float16" and device.type == "cpu":
        raise ValueError("dtype float16: mixed precision on a CPU is bfloat16")
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("dtype bfloat16: this GPU has only float16")


def trainer_settings(
    args: OptimizationArguments, model_args: ModelArguments, folder: Path, device: torch.device
) -> TrainerSettings:
    mixed = resolve_dtype(model_args.dtype, device)
    settings = TrainerSettings(
        output_dir=str(folder), use_cpu=device.type == "cpu", seed=model_args.seed, max_steps=args.num_steps,
        bf16=mixed == torch.bfloat16, fp16=mixed == torch.float16,
        per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        activation_checkpointing=args.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=args.learning_rate, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay, adam_beta2=0.95,
        logging_steps=args.log_steps, logging_nan_inf_filter=False, eval_strategy="steps",
        eval_steps=args.eval_steps, save_steps=args.save_steps, save_total_limit=2,
        remove_unused_columns=False,  # the trainer judges by the model's own `forward`, and ours takes others
        ddp_find_unused_parameters=True,  # those of a layer that all samples skip
        report_to="none", disable_tqdm=False,
    )  # fmt: skip
    settings._n_gpu = min(settings.n_gpu, 1)  # several are for torchrun, not for DataParallel
    return settings
