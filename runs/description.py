"""What a run is: arguments, versions, model and machine, and the heading of the table that names them."""

import platform
import subprocess
import textwrap
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import self_speculation
from arguments import GenerationConfig, JSONObject, ModelArguments
from data import DataArguments
from runs import ranks
from self_speculation.backends.cpu_runner import InPlaceRunner, rounds_prompts
from self_speculation.backends.runners import activation_dtype, eager_runner
from self_speculation.machine.threads import most_threads
from self_speculation.weights.few_bits import formats_of, num_parameters
from self_speculation.weights.kernels import cpu_operators

Record = JSONObject

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "datasets")
# These arguments stand elsewhere in the lines or in the table, or do not change the figures.
_HIDDEN = {
    "model", "dtype", "device", "seed", "output_dir", "threads", "dataset", "num_samples",
    "generation_strategy",
}  # fmt: skip


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe(script: str, arguments: Sequence[Any]) -> Record:
    """The arguments and the time of a run, and the versions of this program and of libraries."""
    return {
        "script": script,
        "began": now(),
        "version": self_speculation.__version__,
        "commit": _commit(),
        "arguments": {key: value for group in arguments for key, value in asdict(group).items()},
        "num_ranks": ranks.num_processes(),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def describe_model(name: str, model: PreTrainedModel, device: torch.device | None = None) -> Record:
    """The model and the machine of a run; `device` says where the model will be."""
    device = device or model.device
    on_gpu = device.type == "cuda"
    computed_in = str(activation_dtype(model)).removeprefix("torch.")
    is_rounded = isinstance(eager_runner(model), InPlaceRunner) and rounds_prompts(model)
    return {
        "model": name,
        "num_layers": model.config.num_hidden_layers,
        "num_parameters": num_parameters(model),
        "dtype": formats_of(model) or str(model.dtype).removeprefix("torch."),
        "computed_in": computed_in,
        "prompts_computed_in": "bfloat16" if is_rounded else computed_in,
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "processor": _processor(),
        "threads": most_threads(model),
        "operators": None if on_gpu else str(cpu_operators()),
        "python": platform.python_version(),
    }


def heading(run: Record, left_out: Collection[str] = ()) -> str:
    """Model, dataset and strategy with their arguments other than defaults, then the machine; in 100 columns.

    Args:
        run: the content of `run.json`.
        left_out: arguments that vary in the table, or that it shows.
    """
    asked = run["arguments"]
    path = Path(run["model"]).expanduser()
    strategy = asked.get("generation_strategy")
    hidden = {*_HIDDEN, *left_out}
    if "exit_layer" not in hidden and (alone := early_exit_alone(asked)):
        strategy = f"{strategy} {alone}"
        hidden = {*hidden, "exit_layer"}
    names = (path.name if path.exists() else run["model"], asked.get("dataset"), strategy)
    settings: list[str] = []
    for name, group in zip(names, (ModelArguments, DataArguments, GenerationConfig), strict=True):
        shown = [each for each in fields(group) if each.name in asked.keys() - hidden]
        changed = [f"{each.name} {asked[each.name]}" for each in shown if asked[each.name] != each.default]
        settings += [*filter(None, [name]), *changed]
    sizes = [f"batch size {asked['batch_size']}"] if "batch_size" in asked else []
    lines = []
    for phrases in (settings, [*machine(run).split(", "), *sizes]):
        text = ", ".join(phrase.replace(" ", "\xa0") for phrase in phrases)  # no line ends in a phrase
        lines += textwrap.wrap(text, 100, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines).replace("\xa0", " ")


def fewest_threads(records: Iterable[Record], most: int) -> int:
    """The fewest threads with which any strategy decoded the records; `most` without records."""
    used = (number for each in records for name, number in each.items() if name.endswith("threads"))
    return min([most, *used])


def machine(run: Record) -> str:
    """Number format, GPU or processor with threads, and number of ranks."""
    dtype, computed_in, of_prompts = run["dtype"], run["computed_in"], run["prompts_computed_in"]
    if not dtype == computed_in == of_prompts:
        dtype = f"weights in {dtype}, products in {computed_in}"
        dtype += f", those of prompts in {of_prompts}" * (of_prompts != computed_in)
    threads = counted(run["threads"], "thread")
    if (used := run.get("threads_used", run["threads"])) < run["threads"]:
        threads = f"down to {used} of {threads}"
    where = f"{run['processor']}, {threads}" if run["device"] == "cpu" else run["device"]
    return f"{dtype}, {where}, {counted(run['num_ranks'], 'rank')}"


def early_exit_alone(asked: Record) -> str:
    """A remark on arguments whose tokens are an early exit's; empty if the tokens are the full model's."""
    if asked.get("generation_strategy") != "autoregressive" or asked["exit_layer"] == -1:
        return ""
    return f"by the early exit at layer {asked['exit_layer']} alone, not by the full model"


def counted(number: int, what: str) -> str:
    """A number and a noun, such as "1 round" or "2 rounds"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _commit() -> str | None:
    """The commit of the running checkout, with -dirty if files differ from it; None outside of a checkout."""
    root = Path(__file__).parent.parent
    git = ["git", "--no-optional-locks", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    # `describe --dirty` would write to the index all the same, under a lock that commits of the user meet.
    command = [*git, "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    with suppress(FileNotFoundError):  # no git
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        commits = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")]
        is_changed = any(not line.startswith("#") for line in lines)
        return f"{commits[0]}{'-dirty' * is_changed}" if commits else None
    return None


def _processor() -> str:
    """The processor's name on Linux, or else the architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
