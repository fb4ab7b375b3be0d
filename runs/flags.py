"""Flags of several groups together: what --tuned sets, and what cannot work. Does not import torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arguments import GenerationConfig, ModelArguments, given_flags, refuse
from runs import ranks

# This file beside the table of a predicted sweep has the count of each token id in the outputs.
COUNTS = "vocabulary.json"
_CHATS = "such as --model HuggingFaceTB/SmolLM2-135M-Instruct; `make chat` brings a small one along"


@dataclass(frozen=True)
class TuningArguments:
    """Settings that a sweep found."""

    tuned: str | None = None
    """Folder of a sweep, its CSV, or its --output_dir: use the best exit layer and draft length, and for
    --draft_vocabulary the ids that it counted."""


def tuned(
    config: GenerationConfig,
    args: TuningArguments,
    model_args: ModelArguments,
    argv: Sequence[str] | None = None,
) -> GenerationConfig:
    """Put exit layer, draft length and draft weights of --tuned's best cell into the config."""
    if args.tuned is None:
        return config
    if config.generation_strategy == "adaptive":
        refuse("--tuned: adaptive chooses for itself, leave it out")
    given = given_flags(argv, GenerationConfig)
    if given & {"exit_layer", "num_speculations"}:
        refuse("--tuned sets exit_layer and num_speculations: leave these flags out")
    _, sweep = _sweep(args.tuned, model_args)
    if (best := sweep["metrics"].get("best")) is None:
        refuse(f"--tuned {args.tuned}: no answers to compare in there")
    found: dict[str, Any] = {name: best[name] for name in ("exit_layer", "num_speculations")}
    if "draft_weights" not in given:
        found["draft_weights"] = sweep["arguments"]["draft_weights"]
    return replace(config, generation_strategy="self_speculative", **found)


def counts(tuned: str | None, model_args: ModelArguments) -> dict[int, int]:
    """The count of each token id in the outputs of the --tuned sweep; empty if it was measured."""
    if tuned is None:
        return {}
    return {int(id_): number for id_, number in _read(_sweep(tuned, model_args)[0] / COUNTS).items()}


def _sweep(tuned: str, model_args: ModelArguments) -> tuple[Path, dict[str, Any]]:
    """The folder of --tuned's newest sweep, and its `run.json`. It must be finished, and of this model."""
    path = Path(tuned).expanduser()
    folder = path if path.is_dir() else path.parent
    runs = [*folder.glob("run.json"), *folder.glob("sweep_*/run.json")] if path.exists() else []
    if not runs:
        refuse(f"--tuned {tuned}: no sweep in there")
    last = max(runs, key=lambda run: run.stat().st_mtime).parent
    sweep = _read(last / "run.json")
    if sweep.get("status") != "finished":
        refuse(f"--tuned {tuned}: the sweep is unfinished, go on with sweep.py --resume {last}")
    names = sweep["model"], model_args.model_name
    if len({Path(name).expanduser().resolve() for name in names}) > 1:
        refuse(f"--tuned {tuned}: is a sweep of --model {names[0]}, not of {names[1]}")
    return last, sweep


def validate(
    model_args: ModelArguments,
    config: GenerationConfig,
    chat: bool = False,
    hint: str | None = "; sweep.py finds exit layer and length, and --tuned FOLDER takes them",
) -> None:
    """End the program in one line if the flags do not fit each other or the model's files.

    Args:
        chat: prompts need the tokenizer's chat template.
        hint: follows an error about missing flags of drafts; None: the script sets exit layer and length.
    """
    if model_args.parallel == "fsdp":
        refuse("--parallel fsdp: is for train.py; must be data, tensor or pipeline")
    if model_args.parallel == "pipeline" and ranks.num_processes() > 1:
        refuse("--parallel pipeline: is one process; start it without torchrun")
    for name, value in {"quantization": "none", "parallel": "data"}.items():
        if config.draft_weights != "exact" and (given := getattr(model_args, name)) != value:
            refuse(f"--draft_weights {config.draft_weights}: not with --{name} {given}")
    for word in config.stop_words or []:  # several in one value never match
        if re.search(r"[^\W\d],[^\W\d]", word) or re.fullmatch(r"""\[\s*(["']).*\1\s*\]""", word, re.DOTALL):
            several = " ".join(re.findall(r"\w+", word))
            refuse(f"--stop_words {word!r}: several stand one after the other, as in {several}")
    folder = Path(model_args.model_name).expanduser()
    if hint is not None:
        layers = _read(folder / "config.json").get("num_hidden_layers")
        try:
            config.check_drafts()
            if isinstance(layers, int) and not model_args.model_args:
                config.check_depth(layers)
        except ValueError as error:
            is_missing = str(error).startswith(("exit_layer:", "num_speculations:"))
            refuse(f"--{error}{hint if is_missing else ''}")
        for idle in config.idle_fields():
            add = f"add --generation_strategy {idle.metadata['used_by'][0]}"
            refuse(
                f"--{idle.name} {getattr(config, idle.name)}: autoregressive decoding drafts nothing, {add}"
            )
    if not folder.exists():
        from self_speculation.loading.sources import LoadingError, check_hub  # takes a moment

        try:
            check_hub(model_args.model_name, model_args.from_pretrained_args().get("revision"))
        except LoadingError as error:
            refuse(f"--{error}")
    tokenizer = _read(folder / "tokenizer_config.json")
    if chat and tokenizer and "chat_template" not in tokenizer and not any(folder.glob("*chat_template*")):
        which = "the bundled model continues Python and" if not model_args.model else "the model's tokenizer"
        refuse(f"--chat True: {which} has no chat template; name a model that has one, {_CHATS}")


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
