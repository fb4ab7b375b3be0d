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
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from self_speculation import *
from self_speculation.config import default_model
found = {{}}
for quantization in ("none", "int8", "int4"):
    model, tokenizer = load_model_and_tokenizer(default_model(), LoadingOptions(quantization=quantization))
    weight = model.model.layers[0].mlp.up_proj.weight
    found[quantization] = {{"kind": type(weight).__name__}}
    for strategy, how in (
        ("autoregressive", {{}}),
        ("self_speculative", {{"exit_layer": 3, "num_speculations": 3}}),
        ("adaptive", {{}}),
    ):
        generator = HuggingfaceLlamaGenerator(tokenizer, model, make_strategy(strategy))
        config = GenerationConfig(sample=False, max_steps=24, generation_strategy=strategy, **how)
        result = generator.generate("def parse_header(line):\\n", config)
        found[quantization][strategy] = result.generation_strategy_result.predicted_tokens
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
    found = json.loads(run.stdout.splitlines()[-1])
    theirs = ["Parameter", "Int8Tensor", "Params4bit"]
    assert [of["kind"] for of in found.values()] == (["Parameter", "Tensor", "Tensor"] if own else theirs)
    for of in found.values():
        assert of["autoregressive"] == of["self_speculative"] == of["adaptive"]
    assert found["int4"]["autoregressive"] != found["none"]["autoregressive"]


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
