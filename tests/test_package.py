"""The library installed as a package, outside the checkout."""

import ast
import importlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import self_speculation


@pytest.mark.slow
def test_the_readmes_example_runs_where_only_the_package_is(tmp_path):
    """Guards against modules or a model that are not installed, and against imports of scripts."""
    source = tmp_path / "source"
    for name in ("self_speculation", "checkpoints"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", tmp_path / "site", source], check=True)
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(import self_speculation\n.*?)```", readme, re.S)
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env={"PYTHONPATH": "site", "HF_HUB_OFFLINE": "1"},
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    text, acceptance = done.stdout.strip().rsplit(maxsplit=1)
    assert len(text) > 20
    assert 0 < float(acceptance) <= 1


def test_its_requirements_are_those_of_the_scripts():
    """Guards against another range of versions in the package."""
    dependencies = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]")[0]
    needed = re.findall(r'"(.+)"', dependencies)
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert len(needed) == 9
    assert set(needed) <= set(lines)


def test_it_imports_nothing_that_is_not_declared():
    """Guards against a library that needs the scripts' requirements."""
    text = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]")[0]
    declared = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)[^"]*"', text)}
    declared |= {"numpy", "self_speculation", *sys.stdlib_module_names}  # transformers needs numpy
    for path in (ROOT / "self_speculation").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= declared, path


NAMES = {
    "generator_base": "GenerationConfig GenerationResult GenerationStrategy GenerationStrategyResult "
    "HuggingfaceLlamaGenerator",
    "autoregressive_generator": "AutoRegressiveGenerationStrategy",
    "self_speculation_generator": "SelfSpeculativeGenerationStrategy",
    "llama_model_utils": "ForwardResult crop_past_key_values decode_next_token forward forward_early "
    "forward_remainder top_k_top_p_filtering",
    "speculative_streamer": "SpeculativeTextStreamer",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_that_scripts_for_the_papers_code_base_import(module):
    """Guards against a public name that moves to another module."""
    found = importlib.import_module(f"self_speculation.{module}")
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_every_public_name_can_be_loaded():
    """Guards against a listed name that does not exist."""
    for name in self_speculation.__all__:
        assert getattr(self_speculation, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        self_speculation.nothing  # noqa: B018
