"""`hub/` is a repository that transformers loads `custom_generate` from."""

import re
import shutil
import sys
from importlib import metadata
from unittest.mock import Mock

import pytest
import torch
import transformers.dynamic_module_utils
from conftest import ROOT, tiny_llama
from test_custom_generate import PROMPT
from test_custom_generate import rounds as rounds
from transformers import AutoModelForCausalLM, GenerationConfig

import self_speculation
from self_speculation.config import default_model


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The working directory, where paths have the card's names, and modules that transformers copies go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, path in {
        "OWNER/self-speculation": ROOT / "hub",
        "facebook/layerskip-llama3.2-1B": default_model(),
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(path)
    return tmp_path


@pytest.fixture
def installed(there, monkeypatch):
    """What pip writes for the package, whose modules are those of the checkout."""
    info = there / f"site/self_speculation-{self_speculation.__version__}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: self-speculation\nVersion: {self_speculation.__version__}\n")
    monkeypatch.syspath_prepend(info.parent)


@pytest.mark.usefixtures("installed")
def test_the_cards_example_runs(rounds):
    """Guards against a card whose example fails, and against one that the plain `generate` answers."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "hub/README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    prompt = names["inputs"]["input_ids"]
    output = names["output"]
    assert (output[:, : prompt.shape[1]] == prompt).all()
    assert output.shape[1] == prompt.shape[1] + 64
    assert max(rounds) == 4


@pytest.mark.usefixtures("installed")
def test_a_models_own_repository_makes_its_generate_draft(there, rounds):
    """Guards against a `generate` that calls itself, and one that loses positional prompts or a streamer."""
    model = tiny_llama()
    folder = there / "model"
    model.save_pretrained(folder)
    settings = {"max_new_tokens": 12, "assistant_early_exit": 2, "num_assistant_tokens": 3, "pad_token_id": 0}
    GenerationConfig(**settings).save_pretrained(folder)
    shutil.copytree(ROOT / "hub/custom_generate", folder / "custom_generate")
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert not rounds
    streamer = Mock()
    torch.testing.assert_close(loaded.generate(PROMPT, streamer=streamer), expected)
    assert max(rounds) == 3
    assert streamer.put.call_count > 1


@pytest.mark.usefixtures("there")
def test_the_package_is_asked_for_by_name_and_version(monkeypatch):
    """Guards against advice to install a package of the index that has the name of our module."""
    monkeypatch.setitem(sys.modules, "self_speculation", None)
    monkeypatch.setattr(metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))
    with pytest.raises(ImportError, match="self-speculation>=") as error:
        tiny_llama().generate(PROMPT, custom_generate="OWNER/self-speculation", trust_remote_code=True)
    assert "pip install" not in str(error.value)
