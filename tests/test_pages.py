"""What the pages tell a reader to type works as printed, and what they point to is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import lm_eval._cli.run
import pytest
from conftest import ROOT

from self_speculation.model.loading import default_model

PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (
        ROOT / "README.md",
        ROOT / "DOCKER.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
    )
)
# They would start this very test.
INSTEAD = {
    "make test": "make --dry-run test",
    ".venv/bin/python -m pytest -m slow": ".venv/bin/python -m pytest -m slow --collect-only",
}

# Stands in for an engine: checks that a target exists, and runs the command here with the paths that volumes
# would have.
DOCKER = r"""#!{python}
import os, re, sys
from pathlib import Path
_, verb, *words = sys.argv
if verb == "build":
    target = words[words.index("--target") + 1]
    kept = [line[1:] for line in Path(".dockerignore").read_text().split() if line[0] == "!"]
    copied = {{path for line in kept for path in Path().glob(re.sub(r"/\*\*$", "/**/*", line))}}
    outside = (".venv", ".git", ".dockerignore", "Dockerfile", "facebook")
    for top in [path for path in Path().iterdir() if path.name not in outside]:
        for path in [top, *top.rglob("*")]:
            if path.is_file() and path not in copied:
                path.unlink()
    sys.exit(f" AS {{target}}\n" not in Path("Dockerfile").read_text())
start = next(i for i, word in enumerate(words) if word in ("python", "torchrun"))
assert re.fullmatch("self-speculation:(cpu|cuda)", words[start - 1]), words[start - 1]
command = words[start:]
for i, word in enumerate(words[:start]):
    if word == "-v":
        outside, inside = words[i + 1].split(":")[:2]
        command = [part.replace(inside, outside) for part in command]
os.environ["PATH"] = os.path.abspath(".venv/bin") + ":" + os.environ["PATH"]
os.execvp(command[0], command)
"""


def blocks(page, language):
    """The code of a page in that language, indented blocks too."""
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^ *```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    )
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def commands(page):
    """Line by line, continuations joined, without comments."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


@pytest.fixture
def checkout(tmp_path):
    """A fresh copy of the repository with this environment as its .venv."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    folder = tmp_path / "checkout"
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name not in ("demo", "chat", "test"):
            (folder / ".venv" / entry.name).symlink_to(entry)
    for stamp in ("demo", "chat", "test"):
        (folder / ".venv" / stamp).touch()
    shutil.copytree(default_model(), folder / "facebook" / "layerskip-llama2-7B")  # as if it were local
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin" / "docker"
    docker.write_text(DOCKER.format(python=sys.executable))
    docker.chmod(0o755)
    return folder


def run(command, folder, language="bash"):
    kind = ["bash", "-e", "-o", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    return subprocess.run(
        # Where generate.py has no --prompt, somebody is there to type one.
        [*kind, command], cwd=folder, input="def f(x):\n", capture_output=True, text=True, timeout=900,
        env={**os.environ, "PATH": f"{folder.parent}/bin:{os.environ['PATH']}"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_works_as_printed(page, checkout):
    """In the order of the page: later commands use what earlier ones wrote. No network, no hub: the one model
    of the hub that pages name is a local folder of that name here.
    """
    for command in commands(page):
        result = run(INSTEAD.get(command, command), checkout)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_every_example_in_python_runs(page, checkout):
    result = run("".join(blocks(page, "python")), checkout, "python")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """Guards against a page or a picture that was moved or deleted."""
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    for target in targets:
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


def test_the_readme_links_every_page():
    text = (ROOT / "README.md").read_text()
    assert [page for page in PAGES if page != "README.md" and f"({page})" not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_page_names_exists(page):
    """The quick half of the slow tests above: guards against a flag that was renamed."""
    sources = ["*.py", "runs/*.py", "training/*.py", "self_speculation/config.py", "benchmarks/*.py"]
    text = "".join(path.read_text() for pattern in sources for path in ROOT.glob(pattern))
    of_lm_eval = Path(lm_eval._cli.run.__file__).read_text()
    known = {"help", *re.findall(r"^    (\w+):", text, re.MULTILINE), *re.findall(r'"--(\w+)"', of_lm_eval)}
    for command in commands(page):
        words = shlex.split(command)
        for script in [i for i, word in enumerate(words) if word.endswith(".py")]:
            flags = {word[2:].partition("=")[0] for word in words[script + 1 :] if word.startswith("--")}
            assert flags <= known, command
