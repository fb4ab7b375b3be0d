"""Device, dtype, seed, weights, tokenizer; and errors that a person can act on.

No code from a model repository is executed unless asked for, and no pickle is read: weights are safetensors,
or GGUF where the file given is one.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
    set_seed,
)
from transformers.distributed import DistributedConfig

from self_speculation.config import DtypeName, LoadingOptions, Parallel, Quantization
from self_speculation.model.adapters import Adapter, find_adapter
from self_speculation.model.captured_runner import capture_decoding
from self_speculation.model.devices import is_lost_rank
from self_speculation.model.families import check_supported
from self_speculation.model.fused_layers import FUSED_MODEL_TYPES, fuse
from self_speculation.model.gguf_files import (
    Header,
    cache_folder,
    mapped_weights,
    read_once,
    read_weights,
)
from self_speculation.model.hub import hub_answers
from self_speculation.model.low_bit_linear import Float16Head, works

# In a checkout, and where the package is installed.
_BUNDLED = (
    Path(__file__).parents[2] / "checkpoints" / "python-10m",
    Path(__file__).parents[1] / "bundled",
)


class LoadingError(Exception):
    """A model cannot be loaded; the message is one line that says what to do."""


class LoadingWarning(UserWarning):
    """A model is loaded, though not as it might have been expected."""


def default_model() -> str:
    """The folder of the small LayerSkip model that comes with this library.

    Raises:
        LoadingError: it has been removed.
    """
    for folder in _BUNDLED:
        if folder.is_dir():
            return str(folder)
    raise LoadingError(f"model: none given, and the bundled one is gone from {_BUNDLED[0]}: name one")


def resolve_device(name: str = "auto") -> torch.device:
    """`cuda` is the GPU of this rank; so is `auto` where there is one, else it is the CPU.

    Raises:
        LoadingError: unknown, or not on this machine.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if name == "auto":
        if os.path.exists("/proc/driver/nvidia"):
            warnings.warn(
                f"device 'auto': running on the CPU; torch {torch.__version__} does not see this machine's "
                "NVIDIA GPU (torch for CUDA 13 needs driver 580 or newer)",
                stacklevel=1,
            )
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LoadingError(
            f"device {name!r}: not on this machine; use auto, cpu, cuda, cuda:N or mps"
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """`auto` is the checkpoint's own dtype, but on the CPU fp32, unless weights in 16 bits can be multiplied
    in it (see `fuse`); `half` is bfloat16 where the device computes in it, else float16.

    Raises:
        LoadingError: unknown, or there is no such arithmetic.
    """
    if name not in get_args(DtypeName):
        raise LoadingError(f"dtype {name!r}: must be one of {', '.join(get_args(DtypeName))}")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name != "half":
        return getattr(torch, name)
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise LoadingError("dtype 'half': this processor does not compute in bfloat16; use float32")
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(False)):
        return torch.bfloat16
    return torch.float16


def load_config(model: str, options: LoadingOptions | None = None) -> PretrainedConfig:
    """The config alone, of a supported type; arguments and errors as `load_model_and_tokenizer`."""
    options = options or LoadingOptions()
    if (adapter := _adapter(model, options)) is not None:
        model = adapter.base
    source, kwargs = _locate(model, options.trust_remote_code)
    with _explained(model):
        with _read_once(_header(model)):
            config = AutoConfig.from_pretrained(source, **kwargs, **options.model_args)
        check_supported(config)
    return config


def load_model_and_tokenizer(
    model: str,
    options: LoadingOptions | None = None,
    config: PretrainedConfig | None = None,
    chat: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for inference.

    Args:
        model: a hub id, a local folder (of a LoRA adapter too, which is merged), or a `.gguf` file.
        options: see there.
        config: what `load_config` gave for the same model and options, where it was called already.
        chat: refuse a tokenizer without a chat template, before any weights are read.

    Raises:
        LoadingError
    """
    options = options or LoadingOptions()
    set_seed(options.seed)
    device = resolve_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # It makes a plan for every new length of keys, which takes longer than a token.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if options.compile and device.type == "cpu":
        raise LoadingError("compile True: needs a GPU; on a CPU decoding is faster without")
    dtype = resolve_dtype(options.dtype, device)
    config = config or load_config(model, options)
    adapter = _adapter(model, options)
    base = model if adapter is None else adapter.base
    source, kwargs = _locate(base, options.trust_remote_code)
    with _explained(model):
        header = _header(base)
        own_tokenizer = adapter is not None and adapter.has_tokenizer
        with _read_once(header):
            tokenizer = AutoTokenizer.from_pretrained(model if own_tokenizer else source, **kwargs)
        if chat and not tokenizer.chat_template:
            raise LoadingError("chat True: the model's tokenizer has no chat template")
        if tokenizer.vocab_size > config.vocab_size:
            raise LoadingError(
                f"model {model!r}: the tokenizer has {tokenizer.vocab_size} tokens, but the model knows only "
                f"{config.vocab_size}: it is that of another model"
            )
        how = {
            **kwargs,
            "dtype": dtype,
            "use_safetensors": True,
            **_placement(options.parallel, device, config),
            **_quantized(options.quantization, dtype, config, base),
            **options.model_args,
        }
        in_16_bits = None if adapter else _format_to_widen(model, options, config, device)
        if in_16_bits is not None:
            loaded = _load(model, source, {**how, "dtype": in_16_bits}, config, header)
            try:
                fuse(loaded, fp32_activations=True)
                return loaded, tokenizer
            except ValueError as error:
                warnings.warn(f"model {model!r}: in float32, since {error}", LoadingWarning, stacklevel=2)
        loaded = _load(model, source, how, config, header)
        if adapter is not None:
            loaded = adapter.merge_into(loaded).eval()
    if options.fuse:
        fuse(loaded)
    if options.compile:
        capture_decoding(loaded)
    return loaded, tokenizer


def _load(
    model: str, source: str, how: dict[str, Any], config: PretrainedConfig, header: Header | None
) -> PreTrainedModel:
    """All weights, from wherever `source` is, or of the `.gguf` file with this header."""
    kind: Any = AutoModelForCausalLM
    where: str | None = source
    if header is not None:
        # The config was made with some of these, and knows the rest of where the model is.
        known = {"gguf_file", "trust_remote_code"}
        how = {
            name: value
            for name, value in how.items()
            if name == "dtype" or not (name in known or hasattr(config, name))
        }
        kind, where, how["config"] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], None, config
        how["state_dict"] = _gguf_weights(model, header, config, how["dtype"])
    loaded, info = kind.from_pretrained(where, **how, output_loading_info=True)
    absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if absent:
        raise LoadingError(
            f"model {model!r}: config and weights do not fit: {len(absent)} tensors, {absent[0]} ..."
        )
    return loaded.eval()


def _gguf_weights(
    model: str, header: Header, config: PretrainedConfig, dtype: torch.dtype | str
) -> dict[str, torch.Tensor]:
    """Those in float16 are mapped from a file in the user's cache, others are in memory."""
    if dtype == torch.float16:
        try:
            return mapped_weights(header, config)
        except OSError as error:
            warnings.warn(
                f"model {model!r}: takes twice the memory, since its weights cannot be kept in "
                f"{cache_folder()} ({error.strerror or error})",
                LoadingWarning,
                stacklevel=2,
            )
    return read_weights(header, config, torch.float32 if isinstance(dtype, str) else dtype)


def _format_to_widen(
    model: str, options: LoadingOptions, config: PretrainedConfig, device: torch.device
) -> torch.dtype | None:
    """In which 16 bits `auto` holds the weights on a CPU, to multiply them in float32; None: in float32."""
    is_plain = (options.parallel, options.quantization, options.fuse) == ("data", "none", True)
    if (
        options.dtype != "auto"
        or not is_plain
        or "dtype" in options.model_args
        or config.model_type not in FUSED_MODEL_TYPES
        or device.type != "cpu"
        or not works(Float16Head, device, torch.float32)
    ):
        return None
    if model.endswith(".gguf"):
        return torch.float16  # its own numbers, in fewer bits, are those that this rounds
    return config.dtype if config.dtype in (torch.bfloat16, torch.float16) else None


def _header(model: str) -> Header | None:
    """That of a `.gguf` file; None for any other model."""
    return Header(Path(model).expanduser()) if model.endswith(".gguf") else None


def _read_once(header: Header | None) -> AbstractContextManager[None]:
    return nullcontext() if header is None else read_once(header)


def _adapter(model: str, options: LoadingOptions) -> Adapter | None:
    """The LoRA adapter that `model` is a folder of; None for any other model. Raises LoadingError."""
    try:
        adapter = find_adapter(model)
    except ValueError as error:
        raise LoadingError(f"model {model!r}: {error}") from error
    for name, plain in (("quantization", "none"), ("parallel", "data")):
        if adapter is not None and (value := getattr(options, name)) != plain:
            raise LoadingError(f"{name} {value}: not with a LoRA adapter; merge it into its model before")
    return adapter


def _placement(parallel: Parallel, device: torch.device, config: PretrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` is told of devices."""
    if parallel != "tensor":
        return {"device_map": "auto" if parallel == "pipeline" else str(device)}
    if not dist.is_initialized() or (ranks := dist.get_world_size()) < 2:
        raise LoadingError(
            "parallel tensor: needs several processes, start it by torchrun --nproc_per_node N"
        )
    if config.num_key_value_heads % ranks:
        heads = config.num_key_value_heads
        raise LoadingError(f"parallel tensor: {ranks} ranks cannot share {heads} heads of keys and values")
    return {"distributed_config": DistributedConfig(tp_size=ranks)}


def _quantized(
    quantization: Quantization, dtype: torch.dtype | str, config: PretrainedConfig, weights: str
) -> dict[str, Any]:
    """What `from_pretrained` is told of weights in fewer bits."""
    if quantization == "none":
        return {}
    library = {"int8": "torchao", "int4": "bitsandbytes"}[quantization]
    if importlib.util.find_spec(library) is None:
        raise LoadingError(
            f"quantization {quantization}: needs {library}, install requirements-quantization.txt"
        )
    if weights.endswith(".gguf") or getattr(config, "quantization_config", None) is not None:
        raise LoadingError(f"quantization {quantization}: the weights of {weights} are quantised already")
    how: TorchAoConfig | BitsAndBytesConfig
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        how = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    else:
        compute = dtype if isinstance(dtype, torch.dtype) else config.dtype
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": how}


def _locate(model: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Where `from_pretrained` finds the model, and what it must be told."""
    path, told = Path(model).expanduser(), {"trust_remote_code": trust_remote_code}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LoadingError(f"model {model!r}: no such file")
        return str(path.parent), {"gguf_file": path.name, **told}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadingError(
                f"model {model!r}: the folder has no config.json, so it is not a Hugging Face model"
            )
        return str(path), told
    if path.is_file():
        raise LoadingError(f"model {model!r}: is a file; must be a hub id, a folder or a .gguf file")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise LoadingError(f"model {model!r}: no such folder")
    return model, {**told, "local_files_only": not hub_answers(model)}


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn whatever loading raises into one line that says what to do."""
    try:
        yield
    except LoadingError:
        raise
    except Exception as error:
        if is_lost_rank(error):
            raise
        raise LoadingError(f"model {model!r}: {_advice(model, error)}") from error


def _advice(model: str, error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return f"access is gated: ask for it at https://huggingface.co/{model}, then run `hf auth login`"
        if isinstance(cause, RepositoryNotFoundError | HFValidationError):
            return "neither a local folder nor a model on the hub (a private one needs `hf auth login`)"
        if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return "not in the local cache, and the hub cannot be reached: check the network or name a folder"
        if isinstance(cause, SafetensorError):
            return f"the weights are corrupt or cut short ({cause}): download them again"
        cause = cause.__cause__ or cause.__context__
    text = str(error).strip() or type(error).__name__
    if "backend tokenizer" in text:  # what transformers says goes on over several lines
        return "no tokenizer in there, such as tokenizer.json: save it to the folder, too"
    if "no file named" in text:
        return "no safetensors weights in there; other formats are not read (pickles can run code)"
    return text.splitlines()[0]
