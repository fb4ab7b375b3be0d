"""LoRA folders, as peft writes them: an adapter, and the name of the model that it changes."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

_FILE = "adapter_config.json"


class Adapter(NamedTuple):
    """A LoRA adapter in a folder, and the model that it changes: a folder or a hub id."""

    folder: Path
    base: str

    @property
    def has_tokenizer(self) -> bool:
        return (self.folder / "tokenizer_config.json").is_file()

    def merge_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with the adapter added to its weights, which stay plain, as fused layers need them."""
        from peft import PeftModel

        with warnings.catch_warnings():  # it asks the model by a name that is going to go
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(model, str(self.folder)).merge_and_unload()


def find_adapter(model: str) -> Adapter | None:
    """The adapter in a folder; None where it is no such folder. Read without peft, which takes seconds to
    import, so that whatever cannot be used is refused at once.

    Raises:
        ValueError: it cannot be used; one line that says what to do.
    """
    folder = Path(model).expanduser()
    if not (folder / _FILE).is_file():
        return None
    try:
        config = json.loads((folder / _FILE).read_text("utf-8"))
        kind, base = config["peft_type"], config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its {_FILE} is damaged: no peft_type or base_model_name_or_path") from error
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError("no adapter_model.safetensors; other formats are not read (pickles can run code)")
    if kind != "LORA":
        raise ValueError(f"is an adapter of type {kind}; only LORA can be merged into its model")
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"is a LoRA adapter of {base}: pip install peft, which merges it, or merge it before"
        )
    return Adapter(folder, base)
