"""Refuses flags that fit neither each other, nor the data, nor the model's files; does not import torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from arguments import DataArguments, GenerationConfig, ModelArguments, refuse
from self_speculation.config import default_model

_CHATS = "such as --model HuggingFaceTB/SmolLM2-135M-Instruct; `make chat` brings a small one along"


def validate(
    model_args: ModelArguments,
    config: GenerationConfig,
    data_args: DataArguments | None = None,
    chat: bool = False,
    hint: str | None = "; sweep.py finds exit layer and length, and --tuned FOLDER takes them",
) -> None:
    """End the program in one line if the flags cannot work.

    Args:
        chat: prompts need the tokenizer's chat template.
        hint: follows an error about missing flags of drafts; None: the script sets exit layer and length.
    """
    _check_pairs(model_args, config)
    if data_args is not None:
        from data import mismatch

        chat = data_args.chat
        if wrong := mismatch(data_args):
            refuse(wrong)
    if hint is not None:
        _check_drafts(config, hint)
    model = default_model() if model_args.model is None else model_args.model
    folder = Path(model).expanduser()
    if not folder.exists():
        _check_hub(model, model_args)
    layers = _read(folder / "config.json").get("num_hidden_layers")
    if hint is not None and isinstance(layers, int) and not model_args.model_args:
        try:
            config.check_depth(layers)
        except ValueError as error:
            refuse(f"--{error}")
    tokenizer = _read(folder / "tokenizer_config.json")
    if chat and tokenizer and "chat_template" not in tokenizer and not any(folder.glob("*chat_template*")):
        which = "the bundled model continues Python and" if not model_args.model else "the model's tokenizer"
        refuse(f"--chat True: {which} has no chat template; name a model that has one, {_CHATS}")


def _check_pairs(model_args: ModelArguments, config: GenerationConfig) -> None:
    """Refuse copies of weights that are not whole, and several stop words in one value, which never match."""
    if config.draft_weights != "exact":
        for name, value in {"quantization": "none", "parallel": "data"}.items():
            if (given := getattr(model_args, name)) != value:
                refuse(f"--draft_weights {config.draft_weights}: not with --{name} {given}")
    for word in config.stop_words or []:
        if re.search(r"[^\W\d],[^\W\d]", word) or re.fullmatch(r"""\[\s*(["']).*\1\s*\]""", word, re.DOTALL):
            several = " ".join(re.findall(r"\w+", word))
            refuse(f"--stop_words {word!r}: several stand one after the other, as in {several}")


def _check_drafts(config: GenerationConfig, hint: str) -> None:
    """Refuse flags about drafts that are missing, do not fit the strategy or are not used by it."""
    try:
        config.check_drafts()
    except ValueError as error:
        is_missing = str(error).startswith(("exit_layer:", "num_speculations:"))
        refuse(f"--{error}{hint if is_missing else ''}")
    for idle in config.idle_fields():
        add = f"add --generation_strategy {idle.metadata['used_by'][0]}"
        refuse(f"--{idle.name} {getattr(config, idle.name)}: autoregressive decoding drafts nothing, {add}")


def _check_hub(model: str, model_args: ModelArguments) -> None:
    from self_speculation.model.sources import LoadingError, check_hub  # takes a moment

    try:
        check_hub(model, model_args.from_pretrained_args().get("revision"))
    except LoadingError as error:
        refuse(f"--{error}")


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none, which loading explains."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
