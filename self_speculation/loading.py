"""Device, dtype, seed, weights, tokenizer; and errors that a person can act on.

No code from a model repository is executed and no pickle is read: weights are safetensors, or GGUF where the
file given is one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from self_speculation import lean_layers
from self_speculation.compiled import compile_decoding
from self_speculation.llama_model_utils import check_supported

DtypeName = Literal["auto", "half", "float32", "bfloat16", "float16"]

# In a checkout, and where the package is installed.
_BUNDLED = (
    Path(__file__).parent.parent / "checkpoints" / "python-10m",
    Path(__file__).parent / "bundled",
)


class LoadingError(Exception):
    """A model cannot be loaded; the message is one line that says what to do."""


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
    """`auto` is fp32 on the CPU and the checkpoint's own dtype elsewhere; `half` is bfloat16 where the device
    computes in it, else float16.

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


def load_config(model: str, model_args: dict[str, Any] | None = None) -> PretrainedConfig:
    """The config alone, of a supported type; arguments and errors as `load_model_and_tokenizer`."""
    source, kwargs = _locate(model)
    with _explained(model):
        config = AutoConfig.from_pretrained(source, **kwargs, **(model_args or {}))
        check_supported(config)
    return config


def load_model_and_tokenizer(
    model: str,
    model_args: dict[str, Any] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 42,
    fuse: bool = True,
    compile: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for inference.

    Args:
        model: a hub id, a local folder, or a `.gguf` file.
        model_args: passed to `from_pretrained`.
        dtype: see `resolve_dtype`.
        device: see `resolve_device`.
        seed: for every random generator.
        fuse: make the layers lean, see `lean_layers`.
        compile: compile the passes of decoding, see `compiled`.

    Raises:
        LoadingError
    """
    set_seed(seed)
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    load_config(model, model_args)
    source, kwargs = _locate(model)
    with _explained(model):
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        options = {
            "dtype": torch_dtype,
            "device_map": str(torch_device),
            "use_safetensors": True,
            **(model_args or {}),
        }
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source, **kwargs, **options, output_loading_info=True
        )
        absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        if absent:
            raise LoadingError(
                f"model {model!r}: config and weights do not fit: {len(absent)} tensors, {absent[0]} ..."
            )
    loaded.eval()
    if fuse:
        lean_layers.fuse(loaded)
    if compile:
        compile_decoding(loaded)
    return loaded, tokenizer


def as_if_never_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """A model read from a .gguf file, which transformers will not save because of where it came from."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def _locate(model: str) -> tuple[str, dict[str, Any]]:
    """Where `from_pretrained` finds the model, and what it must be told."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LoadingError(f"model {model!r}: no such file")
        return str(path.parent), {"gguf_file": path.name, "trust_remote_code": False}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadingError(
                f"model {model!r}: the folder has no config.json, so it is not a Hugging Face model"
            )
        return str(path), {"trust_remote_code": False}
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise LoadingError(f"model {model!r}: no such folder")
    return model, {"trust_remote_code": False}


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn whatever loading raises into one line that says what to do."""
    try:
        yield
    except LoadingError:
        raise
    except Exception as error:
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
    if "no file named" in text:
        return "no safetensors weights in there; other formats are not read (pickles can run code)"
    return text.splitlines()[0]
