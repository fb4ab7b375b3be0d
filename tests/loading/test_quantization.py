"""--quantization: the target itself has weights in fewer bits, and all strategies give its own output."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from conftest import ROOT, needs_operators
from helpers import error_line

from arguments import ModelArguments
from runs.startup import load_generator
from self_speculation import GenerationConfig, LoadingError, LoadingOptions, load_model_and_tokenizer
from self_speculation.loading import loading
from self_speculation.weights.kernels import CPUOperators

# `make test` installs the libraries there: in the environment they would slow down every other test.
LIBRARIES = Path(sys.prefix) / "quantization"

PROGRAM = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import json
from conftest import ADAPTIVE, generate
from self_speculation import LoadingOptions, load_model_and_tokenizer
from self_speculation.config import default_model
found = []
for quantization in ("none", "int8", "int4"):
    model, tokenizer = load_model_and_tokenizer(default_model(), LoadingOptions(quantization=quantization))
    prompt, kind = tokenizer.encode("def parse("), type(model.model.layers[0].mlp.up_proj.weight)
    ways = ({{}}, {{"exit_layer": 3, "num_speculations": 3}}, ADAPTIVE)
    ids = [generate(model, prompt, max_steps=24, **way).predicted_tokens for way in ways]
    found.append((kind.__name__, ids))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("own", [pytest.param(True, marks=needs_operators), False])
def test_strategies_agree_on_a_quantised_model(own):
    """Guards against weights that were not quantised, and against quantisers such as LLM.int8, where the
    result of a token depends on the other tokens of its pass.
    """
    env = {**os.environ, "PYTHONPATH": str(LIBRARIES)}
    env |= {} if own else {"ATEN_CPU_CAPABILITY": "default"}  # there are no operators for it
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, timeout=forks.HANGS, env=env)
    assert run.returncode == 0, run.stderr
    kinds, answers = zip(*json.loads(run.stdout.splitlines()[-1]), strict=True)
    assert kinds == (("Parameter", "Tensor", "Tensor") if own else ("Parameter", "Int8Tensor", "Params4bit"))
    assert all(plain == drafted == adaptive for plain, drafted, adaptive in answers)
    assert answers[0] != answers[2]


@needs_operators
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_line_says_whose_text_it_is(quantization, model_folder, capsys):
    """Guards against text of another model than the one that is named, in silence."""
    arguments = ModelArguments(model=str(model_folder), device="cpu", quantization=quantization)
    load_generator(arguments, GenerationConfig())
    line = f"quantization {quantization}: the text is that of the rounded model"
    assert line in capsys.readouterr().err.splitlines()


def test_impossible_quantisations_are_refused(model_folder, tmp_path, monkeypatch):
    """Guards against an ImportError, and against a flag that transformers ignores with a warning."""

    def refusal(model, quantization):
        options = LoadingOptions(quantization=quantization)
        return error_line(LoadingError, load_model_and_tokenizer, str(model), options)

    monkeypatch.setattr(loading, "cpu_operators", lambda: CPUOperators(None))
    find_spec = "self_speculation.loading.loading.importlib.util.find_spec"
    monkeypatch.setattr(find_spec, lambda name: None)
    for quantization, library in (("int8", "torchao"), ("int4", "bitsandbytes")):
        needs = f"quantization {quantization}: needs {library}, install requirements-quantization.txt"
        assert refusal(model_folder, quantization) == needs
    monkeypatch.setattr(find_spec, lambda name: name)
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert f"int8: the weights of {folder} are quantised already" in refusal(folder, "int8")
