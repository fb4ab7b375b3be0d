"""--quantization: the target itself has weights in fewer bits, and all strategies give the output of that
model.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from conftest import needs_operators
from helpers import error_line, write_program

from self_speculation import LoadingError, LoadingOptions, load_model_and_tokenizer
from self_speculation.loading import loading
from self_speculation.weights.kernels import CPUOperators

# `make test` installs the libraries there: in the environment they would slow down every other test.
LIBRARIES = Path(sys.prefix) / "quantization"

PROGRAM = """
import json
from conftest import ADAPTIVE, generate
from self_speculation import LoadingOptions, default_model, load_model_and_tokenizer
found = []
for quantization in ("none", "int8", "int4"):
    model, tokenizer = load_model_and_tokenizer(default_model(), LoadingOptions(quantization=quantization))
    prompt, kind = tokenizer.encode("def parse("), type(model.model.layers[0].mlp.up_proj.weight)
    ways = ({}, {"exit_layer": 3, "num_speculations": 3}, ADAPTIVE)
    ids = [generate(model, prompt, max_steps=24, **way).predicted_tokens for way in ways]
    found.append((kind.__name__, ids))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("has_operators", [pytest.param(True, marks=needs_operators), False])
def test_strategies_agree_on_a_quantised_model(has_operators, tmp_path):
    """Guards against weights that were not quantised, and against quantisers such as LLM.int8, where the
    result of a token depends on the other tokens of the pass.
    """
    env = {**os.environ, "PYTHONPATH": str(LIBRARIES)}
    env |= {} if has_operators else {"ATEN_CPU_CAPABILITY": "default"}  # there are no operators for it
    command = [sys.executable, write_program(tmp_path, PROGRAM)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=forks.HANGS, env=env)
    assert run.returncode == 0, run.stderr
    kinds, answers = zip(*json.loads(run.stdout.splitlines()[-1]), strict=True)
    assert kinds == (
        ("Parameter", "Tensor", "Tensor") if has_operators else ("Parameter", "Int8Tensor", "Params4bit")
    )
    assert all(plain == drafted == adaptive for plain, drafted, adaptive in answers)
    assert answers[0] != answers[2]


def test_missing_libraries_are_named(model_folder, monkeypatch):
    """Guards against an ImportError."""
    monkeypatch.setattr(loading, "cpu_operators", lambda: CPUOperators(None))
    monkeypatch.setattr("self_speculation.loading.loading.importlib.util.find_spec", lambda name: None)
    for name, library in (("int8", "torchao"), ("int4", "bitsandbytes")):
        options = LoadingOptions(quantization=name)
        line = error_line(LoadingError, load_model_and_tokenizer, str(model_folder), options)
        assert line == f"quantization {name}: needs {library}, install requirements-quantization.txt"
