"""The target's weights in fewer bits: the guarantees are those of the quantised model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from conftest import ROOT

from self_speculation import LoadingError, LoadingOptions, load_model_and_tokenizer
from self_speculation.model.loading import default_model

# `make test` puts the libraries there; in the environment itself they would slow every other test down.
LIBRARIES = Path(sys.prefix) / "quantization"

PROGRAM = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from self_speculation import *
from self_speculation.model.loading import default_model
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
def test_strategies_agree_on_a_quantised_model():
    """Guards against weights that stayed as they were, and against quantisers by which a token's result
    depends on what else is in its pass, as that of LLM.int8 does.
    """
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, timeout=forks.HANGS, env={**os.environ, "PYTHONPATH": str(LIBRARIES)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert [of["kind"] for of in found.values()] == ["Parameter", "Int8Tensor", "Params4bit"]
    for of in found.values():
        assert of["autoregressive"] == of["self_speculative"] == of["adaptive"]
    assert found["int4"]["autoregressive"] != found["none"]["autoregressive"]


@pytest.mark.parametrize(("quantization", "library"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_without_the_library(quantization, library, monkeypatch):
    monkeypatch.setattr("self_speculation.model.loading.importlib.util.find_spec", lambda name: None)
    message = f"quantization {quantization}: needs {library}, install requirements-quantization.txt"
    with pytest.raises(LoadingError, match=message):
        load_model_and_tokenizer(default_model(), LoadingOptions(quantization=quantization))


def test_what_is_quantised_already_is_refused(model_folder, tmp_path, monkeypatch):
    """Guards against a flag that transformers would ignore with a warning."""
    monkeypatch.setattr("self_speculation.model.loading.importlib.util.find_spec", lambda name: name)
    config = json.loads((model_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in model_folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(LoadingError, match=r"quantization int8: the weights of .* are quantised already"):
        load_model_and_tokenizer(str(tmp_path), LoadingOptions(quantization="int8"))
