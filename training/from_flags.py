"""Flags of train.py -> a new Llama, a LoRA adapter, and the settings of transformers' Trainer."""

import warnings
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from huggingface_hub.errors import StrictDataclassError
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers import TrainingArguments as TrainerSettings

from arguments import ModelArguments
from self_speculation.config import DtypeName
from self_speculation.loading.loading import resolve_dtype
from training.flags import OptimizationArguments, is_sharded

# The shape of a new model, unless --model_args says otherwise.
_SHAPE = {
    "vocab_size": 2048, "num_hidden_layers": 16, "hidden_size": 256, "intermediate_size": 704,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def new_config(model_args: ModelArguments, context: int) -> LlamaConfig:
    """The config of a new Llama: --model_args, in LlamaConfig's names. Raises ValueError."""
    given = model_args.from_pretrained_args()
    place = f"model_args {model_args.model_args!r}"
    if unknown := sorted(given.keys() - {each.name for each in fields(LlamaConfig)}):
        raise ValueError(f"{place}: LlamaConfig has no {unknown[0]}")
    shape = {**_SHAPE, **given}
    for name in (*_SHAPE, "head_dim"):
        if isinstance(size := shape.get(name), int) and size < 1:
            raise ValueError(f"{place}: {name} must be at least 1")
    try:
        config = LlamaConfig(
            **shape, max_position_embeddings=context, tie_word_embeddings=True,
            pad_token_id=None,  # padding is the end of a text, whose embedding would stay zero
        )  # fmt: skip
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{place}: {' '.join(str(error).split())}") from error
    heads = config.num_attention_heads
    if config.head_dim % 2 or heads % config.num_key_value_heads or config.vocab_size < 257:
        allowed = "num_key_value_heads divides num_attention_heads, vocab_size is 257 or more, heads are even"
        raise ValueError(f"{place}: {allowed}")
    return config


def new_llama(config: LlamaConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A Llama with random weights in fp32."""
    # Keeps the scale of hidden states from layer to layer; the usual 0.02 does so in wide models only.
    config.initializer_range = config.hidden_size**-0.5
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    set_seed(seed)
    return LlamaForCausalLM(config)


def computed_in(name: DtypeName, device: torch.device) -> torch.dtype:
    """The format of products. Raises ValueError if the device, or FSDP, has no mixed precision in --dtype."""
    dtype = resolve_dtype(name, device)
    if dtype == torch.float16 and (is_sharded() or device.type == "cpu"):
        raise ValueError(f"dtype {name}: float16 needs a GPU without FSDP; must be bfloat16 or float32")
    if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"dtype {name}: is bfloat16, this GPU has only float16")
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def trainer_settings(
    args: OptimizationArguments, model_args: ModelArguments, folder: Path, device: torch.device
) -> TrainerSettings:
    """The arguments of the Trainer."""
    mixed = computed_in(model_args.dtype, device)
    settings = TrainerSettings(
        output_dir=str(folder), use_cpu=device.type == "cpu", seed=model_args.seed, max_steps=args.num_steps,
        bf16=mixed == torch.bfloat16, fp16=mixed == torch.float16,
        per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        activation_checkpointing=args.gradient_checkpointing and not is_sharded(),
        activation_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=args.learning_rate, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay, adam_beta2=0.95,
        logging_steps=max(1, args.num_steps // 100), logging_nan_inf_filter=False, eval_strategy="steps",
        eval_steps=args.eval_steps, save_steps=args.save_steps, save_total_limit=2,
        ddp_find_unused_parameters=False,  # every rank calls every layer
        # Shard gradients between the passes of a step, too.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": is_sharded()}},
        report_to="none", disable_tqdm=False, log_level_replica="error",
    )  # fmt: skip
    if is_sharded() and device.type == "cpu":
        # accelerate shards over GPUs only. torch shards over CPU ranks, too.
        settings.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return settings


def complete_sharding(accelerator: Accelerator, args: OptimizationArguments, dtype: DtypeName) -> None:
    """Add what the flags say to accelerate's config of FSDP, if there is one."""
    if (plugin := getattr(accelerator.state, "fsdp_plugin", None)) is None:
        return
    plugin.activation_checkpointing |= args.gradient_checkpointing
    if (mixed := computed_in(dtype, accelerator.device)) != torch.float32:
        # accelerate's default sums gradients and rounds the loss in 16 bits.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=mixed, reduce_dtype=torch.float32)


def adapted(model: PreTrainedModel, base: str, rank: int) -> PreTrainedModel:
    """The model with a LoRA in fp32 on each linear map of the layers; all other weights are frozen.

    Args:
        base: the model's hub id or path, for the adapter's config.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with warnings.catch_warnings():  # peft uses a deprecated name
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
    path = Path(base).expanduser()
    config.base_model_name_or_path = str(path.resolve()) if path.exists() else base
    return model
