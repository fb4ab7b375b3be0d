"""Loads models: device, dtype, seed, weights, tokenizer.

No code from a model repository runs unless asked for, and no pickle is read: weights are safetensors or GGUF.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import (
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
from transformers.utils import logging

from self_speculation.backends.copies import quantize
from self_speculation.backends.runners import activation_dtype, capture_decoding, check_can_be_captured, fuse
from self_speculation.config import (
    LoadingOptions,
    LoadingWarning,
    Quantization,
    check_kind,
)
from self_speculation.loading.gguf_config import config_of
from self_speculation.loading.gguf_files import load_gguf, storage_dtype
from self_speculation.loading.gguf_header import Header
from self_speculation.loading.sources import LoadingError, adapted_model, explained, locate, path_of
from self_speculation.machine.devices import why_no_gpu
from self_speculation.machine.progress import is_shown
from self_speculation.models.families import LLAMA_LAYOUT, check_supported, experts_per_token, scale_rotation
from self_speculation.weights.kernels import cpu_operators

# (model, trust_remote_code) -> the place that `load_config` has found. So `load_model_and_tokenizer` does not
# ask a hub again that is down.
_LOCATED = dict[tuple[str, bool], tuple[str, dict[str, object]]]()


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
            why = f"torch does not see this machine's NVIDIA GPU: {why_no_gpu()}"
            warnings.warn(f"device 'auto': running on the CPU; {why}", stacklevel=1)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        allowed = "use auto, cpu, cuda, cuda:N, mps or split"
        raise LoadingError(f"device {name!r}: not on this machine; {allowed}") from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """`auto` is the checkpoint's dtype, or float32 on a CPU. `half` is bfloat16 on a CPU and on GPUs that
    compute it, else float16.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name != "half":
        return getattr(torch, name)
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(False)):
        return torch.bfloat16
    return torch.float16


def load_config(model: str | os.PathLike[str], options: LoadingOptions | None = None) -> PretrainedConfig:
    """The config of a supported model; arguments and errors as `load_model_and_tokenizer`."""
    options = LoadingOptions() if options is None else options
    check_kind("options", options, LoadingOptions)
    model = path_of(model)
    model = adapted_model(model, options) or model
    located = locate(model, options.trust_remote_code)
    _LOCATED[model, options.trust_remote_code] = located
    source, kwargs = located
    with explained(model):
        header = _header(model)  # refuses a file that is cut short
        given = _given(options)
        scaling = given.pop("rope_scaling", None)
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
    model = path_of(model)
    options = LoadingOptions() if options is None else options
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
    located = _LOCATED.pop((base, options.trust_remote_code), None)
    source, kwargs = located or locate(base, options.trust_remote_code)
    with explained(model), _bars_of_scripts():
        header = _header(base)
        given = _given(options)
        if header is not None and dtype == "auto":
            dtype = resolve_dtype("half", device)  # blocks of a few bits have no dtype
        folder = Path(model).expanduser()  # an adapter may have another tokenizer than the model
        tokenizer_source = str(folder) if (folder / "tokenizer_config.json").is_file() else source
        tokenizer_header = header if tokenizer_source == source else None
        tokenizer = _load_tokenizer(model, config, tokenizer_source, tokenizer_header, kwargs)
        if chat and not tokenizer.chat_template:
            such = "instruction models have one, such as HuggingFaceTB/SmolLM2-135M-Instruct"
            raise LoadingError(f"chat True: the model's tokenizer has no chat template; {such}")
        bits = _operator_bits(options.quantization, device, config, base)
        is_asked_for = options.dtype != "auto" or "dtype" in given
        reads_file_dtype = adapted is None and options.fuse and not is_asked_for and options.device != "split"
        file_dtype = _file_dtype(device, header, config) if reads_file_dtype else None
        in_config = {"rope_scaling", *config.to_dict()} - {"dtype"}
        device_map = "auto" if options.device == "split" else str(device)
        model_kwargs: dict[str, object] = {
            "dtype": dtype if file_dtype in (None, torch.uint8) else file_dtype,
            "use_safetensors": True,
            "device_map": device_map,
        }
        model_kwargs |= _quantization_kwargs(options.quantization, dtype, config) if bits is None else {}
        model_kwargs |= {name: arg for name, arg in given.items() if name not in in_config}
        if header is None:
            loaded, info = AutoModelForCausalLM.from_pretrained(
                source, config=config, **kwargs, **model_kwargs, output_loading_info=True
            )
            absent = sorted(info["missing_keys"])
        else:
            name = str(model_kwargs["dtype"]).removeprefix("torch.")  # model_args has names
            loaded, absent = load_gguf(
                header, config, None if file_dtype == torch.uint8 else getattr(torch, name)
            )
        if absent:
            missing = f"{len(absent)} tensors are missing, {absent[0]} ..."
            raise LoadingError(f"model {model!r}: config and weights do not fit: {missing}")
        if header is not None:
            loaded = _moved(loaded, device_map)
        if adapted is not None:
            from peft import PeftModel

            # Merged, layers stay plain.
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
        if file_dtype is not None and activation_dtype(loaded) != torch.float32:
            why = "a layer is not one that our operators have"
            warnings.warn(f"model {model!r}: in float32, since {why}", LoadingWarning, stacklevel=2)
            fuse(loaded.float())
    if options.compile:
        capture_decoding(loaded)
    return loaded, tokenizer


def _given(options: LoadingOptions) -> dict[str, object]:
    """The model_args; dtype auto is as none."""
    return {name: value for name, value in options.model_args.items() if (name, value) != ("dtype", "auto")}


@contextmanager
def _bars_of_scripts() -> Iterator[None]:
    """Hide the progress bars of transformers in this context, unless a script shows progress."""
    hides = not is_shown() and logging.is_progress_bar_enabled()
    if hides:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hides:
            logging.enable_progress_bar()


def _load_tokenizer(
    model: str, config: PretrainedConfig, source: str, header: Header | None, kwargs: dict[str, object]
) -> PreTrainedTokenizerBase:
    """The tokenizer of a `.gguf` file, or of a folder. Raises LoadingError if it is another model's."""
    if header is None:
        folder_kwargs = {name: arg for name, arg in kwargs.items() if name != "gguf_file"}
        tokenizer = AutoTokenizer.from_pretrained(source, **folder_kwargs)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, gguf_file=header.path.name)
    has = tokenizer.vocab_size
    knows = config.vocab_size
    if has > knows:
        why = f"the tokenizer has {has} tokens, but the model knows only {knows}"
        raise LoadingError(f"model {model!r}: {why}: it is that of another model")
    return tokenizer


def _moved(model: PreTrainedModel, device_map: str) -> PreTrainedModel:
    """Move a model from the CPU to a device, or split it over all GPUs."""
    if device_map != "auto":
        return model.to(device_map)
    kept_whole = model._no_split_modules
    memory = get_balanced_memory(model, no_split_module_classes=kept_whole)
    return dispatch_model(model, infer_auto_device_map(model, memory, no_split_module_classes=kept_whole))


def _file_dtype(device: torch.device, header: Header | None, config: PretrainedConfig) -> torch.dtype | None:
    """The dtype of weights that operators read as a file has them; uint8: few bits. None: they cannot."""
    if not _has_operators(device):
        return None
    dtype = config.dtype if header is None else storage_dtype(header)
    is_read = dtype in (torch.bfloat16, torch.float16) and config.model_type in LLAMA_LAYOUT
    return dtype if is_read or dtype == torch.uint8 else None


def _has_operators(device: torch.device) -> bool:
    return device.type == "cpu" and cpu_operators().variant is not None


def _header(model: str) -> Header | None:
    """The header of a `.gguf` file; None for any other model."""
    return Header(Path(model).expanduser()) if model.lower().endswith(".gguf") else None


def _operator_bits(
    quantization: Quantization, device: torch.device, config: PretrainedConfig, weights: str
) -> int | None:
    """Bits of a weight that `quantize` rounds to, for our operators; None: no rounding. Raises LoadingError
    for weights that are quantised already.
    """
    if quantization == "none":
        return None
    if weights.lower().endswith(".gguf") or getattr(config, "quantization_config", None) is not None:
        raise LoadingError(f"quantization {quantization}: the weights of {weights} are quantised already")
    return {"int8": 8, "int4": 4}[quantization] if _has_operators(device) else None


def _quantization_kwargs(
    quantization: Quantization, dtype: torch.dtype | str, config: PretrainedConfig
) -> dict[str, object]:
    """Arguments of `from_pretrained` for torchao or bitsandbytes, which quantise the weights."""
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
