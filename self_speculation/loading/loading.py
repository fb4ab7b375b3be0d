"""Loads models: device, dtype, seed, weights, tokenizer.

No code from a model repository runs unless asked for, and no pickle is read: weights are safetensors or GGUF.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TorchAoConfig,
    set_seed,
)

from self_speculation.config import (
    LoadingOptions,
    LoadingWarning,
    Quantization,
    check_kind,
)
from self_speculation.families import FUSED_FAMILIES, check_supported, scale_rotation
from self_speculation.loading.gguf_config import config_of
from self_speculation.loading.gguf_files import (
    Header,
    dense_dtype,
    has_few_bits,
    load_in_few_bits,
    read_weights,
)
from self_speculation.loading.sources import LoadingError, adapted_model, explained, locate
from self_speculation.passes.fused_layers import activation_dtype, fuse
from self_speculation.passes.quantized_layers import quantize
from self_speculation.passes.runners import capture_decoding, check_can_be_captured
from self_speculation.weights.experts import experts_per_token
from self_speculation.weights.kernels import cpu_operators


def resolve_device(name: str = "auto") -> torch.device:
    """`cuda` is the GPU of this rank; `auto` is that GPU if there is one, else the CPU; `split` begins there.
    Raises LoadingError if it is not on this machine.
    """
    if name == "split":
        name = "auto"
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if name == "auto":
        if os.path.exists("/proc/driver/nvidia"):
            why = f"torch {torch.__version__} does not see this machine's NVIDIA GPU"
            advice = "torch for CUDA 13 needs driver 580 or newer"
            warnings.warn(f"device 'auto': running on the CPU; {why} ({advice})", stacklevel=1)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        allowed = "use auto, cpu, cuda, cuda:N, mps or split"
        raise LoadingError(f"device {name!r}: not on this machine; {allowed}") from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """`auto` is the checkpoint's own dtype, or float32 on a CPU; `half` is bfloat16 where the device computes
    it, else float16. Raises LoadingError if it is not computed on this device.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name != "half":
        return getattr(torch, name)
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise LoadingError("dtype 'half': this processor does not compute in bfloat16; use float32")
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(False)):
        return torch.bfloat16
    return torch.float16


def load_config(model: str | os.PathLike[str], options: LoadingOptions | None = None) -> PretrainedConfig:
    """The config of a supported model; arguments and errors as `load_model_and_tokenizer`."""
    options = LoadingOptions() if options is None else options
    check_kind("options", options, LoadingOptions)
    model = adapted_model(os.fspath(model), options) or os.fspath(model)
    source, kwargs = locate(model, options.trust_remote_code)
    with explained(model):
        header = _header(model)  # refuses a file that is cut short
        scaling = (given := {**options.model_args}).pop("rope_scaling", None)
        config = (
            AutoConfig.from_pretrained(source, **kwargs, **given)
            if header is None
            else config_of(header, given)
        )
        check_supported(config)
        if header is not None and experts_per_token(config) is not None:
            raise ValueError(f"experts of a {config.model_type} model are read from safetensors only")
        if scaling is not None:
            scale_rotation(config, scaling)
    return config


def load_model_and_tokenizer(
    model: str | os.PathLike[str],
    options: LoadingOptions | None = None,
    config: PretrainedConfig | None = None,
    chat: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for inference.

    Args:
        model: a hub id, a local folder (of a LoRA adapter too, which is merged), or a `.gguf` file.
        config: result of `load_config` for the same model and options, if there is one.
        chat: refuse a tokenizer without a chat template, before any weights are read.

    Raises:
        LoadingError
    """
    model, options = os.fspath(model), LoadingOptions() if options is None else options
    check_kind("options", options, LoadingOptions)
    set_seed(options.seed)
    device = resolve_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if options.compile and device.type == "cpu":
        raise LoadingError("compile True: needs a GPU; on a CPU decoding is faster without")
    dtype = resolve_dtype(options.dtype, device)
    config = config or load_config(model, options)
    if options.compile:
        check_can_be_captured(config)
    adapted = adapted_model(model, options)
    base = adapted or model
    source, kwargs = locate(base, options.trust_remote_code)
    with explained(model):
        header = _header(base)
        if header is not None and dtype == "auto":
            dtype = resolve_dtype("half", device)  # blocks of a few bits have no dtype of their own
        folder = Path(model).expanduser()  # an adapter may have another tokenizer than its model
        where = str(folder) if (folder / "tokenizer_config.json").is_file() else source
        if header is not None and where == source:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source, gguf_file=header.path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(where, **kwargs)
        if chat and not tokenizer.chat_template:
            raise LoadingError("chat True: the model's tokenizer has no chat template")
        if tokenizer.vocab_size > config.vocab_size:
            has, knows = tokenizer.vocab_size, config.vocab_size
            why = f"the tokenizer has {has} tokens, but the model knows only {knows}"
            raise LoadingError(f"model {model!r}: {why}: it is that of another model")
        bits = _bits(options.quantization, device, config, base)
        keeps_format = adapted is None and _keeps_format(options, device)
        in_few_bits = keeps_format and header is not None and has_few_bits(header)
        own = _own_dtype(header, config) if keeps_format else None
        in_config = {"rope_scaling", *config.to_dict()} - {"dtype"}
        place = "auto" if options.device == "split" else str(device)
        how = {"dtype": own or dtype, "use_safetensors": True, "device_map": place}
        how |= _quantized(options.quantization, dtype, config) if bits is None else {}
        how |= {name: arg for name, arg in options.model_args.items() if name not in in_config}
        if header is None:
            loaded, absent = _load(AutoModelForCausalLM, source, config, **kwargs, **how)
        elif in_few_bits:
            loaded, absent = load_in_few_bits(header, config)
        else:
            read_in = how["dtype"] if isinstance(how["dtype"], torch.dtype) else torch.float32
            weights = read_weights(header, config, read_in)
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            loaded, absent = _load(kind, None, config, state_dict=weights, **how)
        if absent:
            missing = f"{len(absent)} tensors are missing, {absent[0]} ..."
            raise LoadingError(f"model {model!r}: config and weights do not fit: {missing}")
        if adapted is not None:
            from peft import PeftModel

            # Merged, weights stay plain: others are not fused.
            loaded = PeftModel.from_pretrained(loaded, str(folder)).merge_and_unload().eval()
    if bits is not None:
        try:
            if options.fuse:
                fuse(loaded)  # activations that weigh errors are in float32
            quantize(loaded, bits)
        except ValueError as error:
            raise LoadingError(str(error)) from error
    if options.fuse:
        fuse(loaded)
        if own is not None and activation_dtype(loaded) != torch.float32:
            why = "a layer is not one that our operators have"
            warnings.warn(f"model {model!r}: in float32, since {why}", LoadingWarning, stacklevel=2)
            fuse(loaded.float())
    if options.compile:
        capture_decoding(loaded)
    return loaded, tokenizer


def _load(
    kind: Any, source: str | None, config: PretrainedConfig, **how: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A model of all weights in `source`, and the names of those that are missing."""
    loaded, info = kind.from_pretrained(source, config=config, **how, output_loading_info=True)
    return loaded, sorted(info["missing_keys"])


def _own_dtype(header: Header | None, config: PretrainedConfig) -> torch.dtype | None:
    """The dtype of weights that operators read as they are; None: it is float32, or they are in few bits."""
    if config.model_type not in FUSED_FAMILIES or (header is not None and has_few_bits(header)):
        return None
    dtype = config.dtype if header is None else dense_dtype(header)
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _keeps_format(options: LoadingOptions, device: torch.device) -> bool:
    """Whether weights keep the format of their file: for operators, unless another dtype is asked for."""
    is_exact = options.dtype == "auto" and "dtype" not in options.model_args
    return is_exact and options.fuse and options.device != "split" and _has_operators(device)


def _has_operators(device: torch.device) -> bool:
    return device.type == "cpu" and cpu_operators().variant is not None


def _header(model: str) -> Header | None:
    """The header of a `.gguf` file; None for any other model."""
    return Header(Path(model).expanduser()) if model.lower().endswith(".gguf") else None


def _bits(
    quantization: Quantization, device: torch.device, config: PretrainedConfig, weights: str
) -> int | None:
    """Bits that loaded weights are rounded to for our operators; None: they are not. Raises LoadingError if
    they are in few bits already.
    """
    if quantization == "none":
        return None
    if weights.lower().endswith(".gguf") or getattr(config, "quantization_config", None) is not None:
        raise LoadingError(f"quantization {quantization}: the weights of {weights} are quantised already")
    return {"int8": 8, "int4": 4}[quantization] if _has_operators(device) else None


def _quantized(
    quantization: Quantization, dtype: torch.dtype | str, config: PretrainedConfig
) -> dict[str, Any]:
    """Arguments of `from_pretrained` about weights in fewer bits by other libraries."""
    if quantization == "none":
        return {}
    library = {"int8": "torchao", "int4": "bitsandbytes"}[quantization]
    if importlib.util.find_spec(library) is None:
        needs = f"needs {library}, install requirements-quantization.txt"
        raise LoadingError(f"quantization {quantization}: {needs}")
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))}
    compute = dtype if isinstance(dtype, torch.dtype) else config.dtype
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": nf4}
