"""The library installed as a package, outside the checkout."""

import ast
import importlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_layout import MODULES, imports

import self_speculation
from self_speculation.weights.kernels import cpu_operators

(COMMAND,) = (
    ast.literal_eval(node.value)
    for node in ast.parse((ROOT / "setup.py").read_text()).body
    if isinstance(node, ast.Assign)
)


@pytest.mark.slow
def test_the_readmes_example_runs_where_only_the_package_is(tmp_path):
    """Guards against modules or a model that are not installed, and against imports of scripts."""
    source = tmp_path / "source"
    for name in ("self_speculation", "checkpoints", "measures", "runs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", *COMMAND[:3]):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", tmp_path / "site", source], check=True)
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(import self_speculation\n.*?)```", readme, re.S)
    # Its operators are built in: there is no compiler.
    show = "from self_speculation.weights.kernels import cpu_operators; print(cpu_operators())"
    command = [sys.executable, "-c", f"{example}\n{show}"]
    here = {"PYTHONPATH": "site", "HF_HUB_OFFLINE": "1", "CXX": "none", "SELF_SPECULATION_CACHE": "cache"}
    done = subprocess.run(command, cwd=tmp_path, env=here, check=True, capture_output=True, text=True)
    text, operators = done.stdout.strip().rsplit("\n", 1)
    assert operators == str(cpu_operators())
    text, acceptance = text.rsplit(maxsplit=1)
    assert len(text) > 20
    assert 0 < float(acceptance) <= 1
    # Without torch, and with no other script.
    (tmp_path / "light").mkdir()
    (tmp_path / "light" / "torch.py").write_text("raise SystemExit('torch is imported')\n")
    command = [sys.executable, tmp_path / "site" / "bin" / "self-speculation-equality"]
    here["PYTHONPATH"] = "light:site"
    asked = [*command, "--url", "http://127.0.0.1:9"]
    done = subprocess.run(asked, cwd=tmp_path, env=here, capture_output=True, text=True)
    said = "self-speculation-equality: error: --url http://127.0.0.1:9: no answer ("
    assert (done.returncode, done.stderr.startswith(said)) == (2, True), done.stderr


def test_a_wheel_has_the_modules_of_the_command():
    """Guards against an installed command that cannot import what equality.py has come to need."""
    needed = {"runs", "measures"}
    new = {"equality"}
    while new:
        needed |= new
        new = {other for name in new for other in imports(name)} - needed
        new = {name for name in new if not name.startswith("self_speculation")}
    paths = {MODULES[name].relative_to(ROOT).as_posix() for name in needed}
    assert paths == {*COMMAND}


def test_the_citation_has_the_version():
    """Guards against a citation of another release."""
    assert f"\nversion: {self_speculation.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_it_declares_what_it_imports():
    """Guards against a library that needs the scripts' requirements, or other versions of them."""
    text = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]")[0]
    needed = re.findall(r'"(.+)"', text)
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert set(needed) <= set(lines)
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in needed}
    # transformers needs numpy. torch for CUDA brings triton; the module that needs it is imported late.
    declared |= {"numpy", "triton", "self_speculation", *sys.stdlib_module_names}
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


def test_public_names():
    """Guards against a name that scripts for the paper's code base import, or a listed one, that is gone."""
    for module, names in NAMES.items():
        found = importlib.import_module(f"self_speculation.{module}")
        assert [name for name in names.split() if not hasattr(found, name)] == []
    for name in self_speculation.__all__:
        assert getattr(self_speculation, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        self_speculation.nothing  # noqa: B018
