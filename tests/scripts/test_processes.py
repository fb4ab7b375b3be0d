"""Each script as a user starts it: by python, and by torchrun over two ranks.

Other tests start scripts as forks of a process that has imported everything (forks.py). Guards against what
those cannot see: a module that is imported in one order only, an import that is missing, what a script
needs of its name or its place, and variables that torchrun sets.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
from conftest import ROOT
from helpers import custom_data, torchrun

SHORT = ["--max_steps", "4", "--sample", "False"]
DRAFTS = ["--exit_layer", "2", "--num_speculations", "2"]
TRAINING = [
    "--vocabulary_size", "300", "--num_layers", "2", "--hidden_size", "16", "--intermediate_size", "24",
    "--num_heads", "2", "--num_kv_heads", "1", "--sequence_length", "32", "--batch_size", "2",
    "--num_steps", "2", "--warmup_steps", "1", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def command(model_folder, tmp_path):
    """Script and flags for next to no work; what its standard output holds once."""
    model = ["--model", model_folder, "--output_dir", tmp_path / "logs"]
    data = ["--dataset", "custom_jsonl", "--data_path", custom_data(tmp_path), "--num_samples", "2"]
    grid = ["--exit_layer_last", "1", "--num_speculations_last", "1"]
    tasks = ["--tasks", "python_functions", "--include_path", ROOT / "eval_tasks", "--limit", "2"]
    flags = {
        "generate": ([*model, *SHORT, "--prompt", "def"], "\n"),
        "benchmark": ([*model, *SHORT, *data], "tokens/s, decode"),
        "correctness": ([*model, *SHORT, *DRAFTS, *data], "passed: "),
        "sweep": ([*model, *SHORT, *data, *grid], "--generation_strategy self_speculative"),
        "eval": ([*model, *SHORT, *tasks], "python_functions: 2 answers"),
        "train": (
            [*model[2:], *TRAINING, "--data_path", ROOT / "runs/*.py", "--eval_fraction", "0.4"],
            "exits.csv",
        ),
    }

    def of(name):
        args, once = flags[name]
        return [str(ROOT / f"{name}.py"), *map(str, args)], once

    return of


# In the default run generate.py is started so by test_a_cache_that_cannot_be_written, and serve.py by
# test_a_server_from_its_start_to_its_end.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate", "benchmark", "correctness", "eval", "sweep", "train"])
def test_by_python(name, command):
    words, once = command(name)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=forks.HANGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(once) == 1


def test_eval_begins():
    """What is left of the slow one above in the default run: everything is imported, in this order."""
    done = subprocess.run(
        [sys.executable, "-c", "import eval, measures.evaluation"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# What benchmark.py does with its ranks, the slow ones do as well, by the same functions; and each is started
# over two ranks by another test, though not by torchrun itself.
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("benchmark", "correctness", "sweep", "eval", "train")
]


@pytest.mark.parametrize("name", ["generate", *SLOW])
def test_by_torchrun(name, command):
    """Of benchmark.py in the default run, too: test_parallel.py kills one of its ranks."""
    words, once = command(name)
    done = torchrun(2, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(once) == 1


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(model_folder, script):
    """A local model needs no cache."""
    run = subprocess.run(
        script("generate.py", "--model", model_folder, "--prompt", "def", "--max_steps", "3"),
        capture_output=True, text=True, timeout=forks.HANGS,
        env={**os.environ, "HF_HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr


def test_ctrl_c_while_imports_take_their_time(model_folder):
    """Guards against a page of traceback for somebody who changed their mind early."""
    command = [sys.executable, str(ROOT / "generate.py"), "--model", str(model_folder), "--prompt", "def"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE)
    while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=forks.HANGS)[1] == b"interrupted\n"
    assert run.returncode == 130
