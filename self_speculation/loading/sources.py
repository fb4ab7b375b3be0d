"""Where a model is (on the hub, in a folder, a `.gguf` file, a LoRA folder), and errors of reading it."""

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from self_speculation.config import LoadingOptions, why_no_model

_HUB_TIMEOUT = 5.0  # seconds
_UNREACHABLE = "not in the local cache, and the hub cannot be reached: check the network or name a folder"


class LoadingError(Exception):
    """A model cannot be loaded; the message is one line with advice."""


def hub_answers(repo: str, kind: Literal["model", "dataset"] = "model") -> bool:
    """Whether the hub can be reached, whether or not it has the repository.

    Loading from the hub retries for half a minute before it reads the local cache.
    """
    try:
        get_hf_file_metadata(hf_hub_url(repo, "README.md", repo_type=kind), timeout=_HUB_TIMEOUT)
    except HfHubHTTPError as error:
        return error.response.status_code < 500
    except Exception:  # without a network, each version of the hub's client raises another error
        return False
    return True


def path_of(model: object) -> str:
    """The name of a model, as a text. Raises LoadingError if it is none."""
    if not isinstance(model, str | os.PathLike):
        raise LoadingError(f"model {model!r}: must be a hub id, a folder or a .gguf file")
    return os.fspath(model)


def locate(model: str, trust_remote_code: bool) -> tuple[str, dict[str, object]]:
    """The source of a model and further arguments, for `from_pretrained`. Raises LoadingError if there is no
    such file or folder.
    """
    if (why := why_no_model(model)) is not None:
        raise LoadingError(f"model {model!r}: {why}")
    path = Path(model).expanduser()
    options: dict[str, object] = {"trust_remote_code": trust_remote_code}
    if path.suffix.lower() == ".gguf":
        return str(path.parent), {"gguf_file": path.name, **options}
    if path.is_dir():
        return str(path), options
    return model, {**options, "local_files_only": not hub_answers(model)}


def config_file(model: str) -> Path:
    """The path of a model's config.json, which may be missing in a folder. Raises LoadingError if neither the
    cache nor the hub has it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / "config.json"
    with explained(model):
        if isinstance(cached := try_to_load_from_cache(model, "config.json"), str):
            return Path(cached)
        return Path(hf_hub_download(model, "config.json", local_files_only=not hub_answers(model)))


def adapted_model(folder: str, options: LoadingOptions | None = None) -> str | None:
    """The folder or hub id of the model that a folder's LoRA adapter changes; None: it has no adapter. Raises
    LoadingError if the adapter cannot be used, or not with the options.
    """
    file = Path(folder).expanduser() / "adapter_config.json"
    if not file.is_file():
        return None
    options = options or LoadingOptions()
    is_split = options.device == "split"
    if is_split or options.quantization != "none":
        given = "device split" if is_split else f"quantization {options.quantization}"
        raise LoadingError(f"{given}: not with a LoRA adapter; merge it into its model before")
    try:  # without peft, which takes seconds to import
        config = json.loads(file.read_text("utf-8"))
        kind = config["peft_type"]
        base = config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        why = "its adapter_config.json is damaged: no peft_type or base_model_name_or_path"
        raise LoadingError(f"model {folder!r}: {why}") from error
    if not file.with_name("adapter_model.safetensors").is_file():
        why = "no adapter_model.safetensors; other formats are not read (pickles can run code)"
    elif kind != "LORA":
        why = f"is an adapter of type {kind}; only LORA can be merged into its model"
    elif importlib.util.find_spec("peft") is None:
        why = f"is a LoRA adapter of {base}: pip install peft, which merges it, or merge it before"
    else:
        return base
    raise LoadingError(f"model {folder!r}: {why}")


@contextmanager
def explained(model: str) -> Iterator[None]:
    """Turn errors of loading into a LoadingError of one line with advice."""
    try:
        yield
    except LoadingError:
        raise
    except Exception as error:
        if "torch" in sys.modules:  # without it there are no ranks to lose
            from self_speculation.machine.devices import is_lost_rank

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
            return _UNREACHABLE
        if isinstance(cause, SafetensorError):
            return f"the weights are corrupt or cut short ({cause}): download them again"
        cause = cause.__cause__ or cause.__context__
    text = str(error).strip() or type(error).__name__
    if "backend tokenizer" in text:  # transformers' message has several lines
        return "no tokenizer in there, such as tokenizer.json: save it to the folder, too"
    if "ignore_mismatched_sizes" in text:
        return "config and weights do not fit: some tensors have another shape"
    if "no file named" in text:
        return "no safetensors weights in there; other formats are not read (pickles can run code)"
    return text.splitlines()[0]
