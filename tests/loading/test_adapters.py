"""A LoRA folder as --model: loading merges it into the base model, or refuses it in one line."""

import importlib.util
import sys
from pathlib import Path

import pytest
from helpers import error_line, run_program

from self_speculation import LoadingError, LoadingOptions, load_model_and_tokenizer
from self_speculation.loading.loading import load_config

LORA = '{"peft_type": "LORA", "base_model_name_or_path": "%s"}'

# `make test` installs peft there: in the environment it would slow down every other test.
LIBRARIES = Path(sys.prefix) / "lora"

PROGRAM = f"""
import sys; sys.path.append({str(LIBRARIES)!r})
import torch
from conftest import ids_of
from helpers import error_line
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from self_speculation import load_model_and_tokenizer, self_speculative_generate
from runs.program import run
import generate
base, folder = sys.argv[1:]
ids = torch.tensor([[5, 6, 7, 8]])
ours = dict(custom_generate=self_speculative_generate, exit_layer=2, num_speculations=3)
def fresh():
    return AutoModelForCausalLM.from_pretrained(base)
def answer(model, **how):
    return model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, **how).tolist()

# Not initialised to zero: such an adapter changes nothing.
lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
adapted = get_peft_model(fresh(), lora).eval()
assert answer(adapted, **ours) == answer(adapted)
says = error_line(ValueError, ids_of, adapted)
assert "pass model.merge_and_unload(), or model.get_base_model()" in says
text = ids_of(adapted.get_base_model(), ids[0].tolist(), eos=(2,), max_steps=8)
assert ids[0].tolist() + text == answer(adapted)[0][:4 + len(text)]
for kind in (PromptTuningConfig, PromptEncoderConfig):
    tuned = get_peft_model(fresh(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    assert "as for prompt tuning" in error_line(ValueError, answer, tuned, **ours)
    assert "prompt tuning is not followed" in error_line(ValueError, ids_of, tuned)

adapted.save_pretrained(folder)
merged, tokenizer = load_model_and_tokenizer(folder)
plain, own_tokenizer = load_model_and_tokenizer(base)
expected = adapted(ids).logits
torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-4)  # sums in another order
assert not torch.allclose(plain(ids).logits, expected, atol=0.1)
assert {{name for name, _ in merged.named_parameters()}} == {{name for name, _ in plain.named_parameters()}}
assert tokenizer.encode("add") == own_tokenizer.encode("add")
sys.argv[1:] = ["--model", folder, "--prompt", "def", "--max_steps", "4", "--draft_weights", "int4",
                "--generation_strategy", "self_speculative", "--exit_layer", "2", "--num_speculations", "2"]
run(generate.main)
"""


@pytest.fixture
def folder(tmp_path):
    """A LoRA folder with a config and no weights, which no test here reads."""
    (tmp_path / "adapter_config.json").write_text(LORA % (tmp_path / "base"))
    (tmp_path / "adapter_model.safetensors").touch()
    return tmp_path


def refusal(folder, **options):
    """The line by which `load_config` and `load_model_and_tokenizer` refuse it."""
    loads = (load_config, load_model_and_tokenizer)
    line, other = (error_line(LoadingError, load, str(folder), LoadingOptions(**options)) for load in loads)
    assert line == other
    return line


@pytest.mark.slow
def test_models_of_peft(model_folder, tmp_path):
    """Guards against the output of the base model, weights of peft's classes (such layers are not fused
    and have no copies in four bits), and drafts that ignore a tuned prompt.
    """
    result = run_program(1, tmp_path, PROGRAM, model_folder, tmp_path / "adapter")
    assert result.returncode == 0, result.stderr
    assert "4 tokens in" in result.stderr


SPLIT = {"device": "split"}
INT8 = {"quantization": "int8"}


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ("{", {}, "its adapter_config.json is damaged"),
        ('{"peft_type": "LORA"}', {}, "its adapter_config.json is damaged"),
        (LORA.replace("LORA", "IA3") % "x", {}, "is an adapter of type IA3; only LORA can be merged"),
        (LORA % "a/b", {}, "is a LoRA adapter of a/b: pip install peft, which merges it"),
        (LORA % "a/b", INT8, "quantization int8: not with a LoRA adapter; merge it"),
        (LORA % "a/b", SPLIT, "device split: not with a LoRA adapter; merge it"),
        (None, {}, "no adapter_model.safetensors; other formats are not read (pickles can run code)"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(config, options, says, folder, monkeypatch):
    """Guards against an error about a missing config.json, tracebacks from inside peft, pickles, which peft
    reads, and an adapter that is merged into quantised or sharded weights.
    """
    monkeypatch.setattr("self_speculation.loading.sources.importlib.util.find_spec", lambda name: None)
    if config is None:
        (folder / "adapter_model.safetensors").unlink()
    else:
        (folder / "adapter_config.json").write_text(config)
    assert says in refusal(folder, **options)


def test_a_base_model_that_is_not_there_is_named(folder, monkeypatch):
    """Guards against the adapter's name in place of the base model's."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "peft" or find(name))
    assert refusal(folder) == f"model '{folder / 'base'}': no such folder"
