"""The library installed as a package, outside the checkout."""

import re
import shutil
import subprocess
import sys

from conftest import ROOT


def test_the_readmes_example_runs_where_only_the_package_is(tmp_path):
    """Guards against modules or a model that pip leaves behind, and an import of a script's module."""
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
    text, acceptance = done.stdout.strip().rsplit("\n", 1)
    assert len(text) > 20
    assert 0 < float(acceptance) <= 1


def test_its_requirements_are_those_of_the_scripts():
    dependencies = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]")[0]
    needed = re.findall(r'"(.+)"', dependencies)
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert len(needed) == 7
    assert set(needed) <= set(lines)
