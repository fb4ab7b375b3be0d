"""Commands and examples of the pages work as printed, and their links lead somewhere."""

import ast
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack, redirect_stdout
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT
from test_llama_model_utils import is_dense

from benchmarks.servers import started
from self_speculation.config import default_model
from self_speculation.families import FAMILIES, LLAMA_LAYOUT

FILES = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))]
PAGES = sorted({*FILES} - {"CHANGELOG.md"})
# The commands of these pages are not run: one of them takes two hours.
CARDS = ["CHANGELOG.md", "checkpoints/python-10m/README.md", "eval_tasks/README.md", "hub/README.md"]
NOTEBOOK = "docs/tour.ipynb"
ALL = [*PAGES, *CARDS, NOTEBOOK]
# These commands would start this test or not end.
INSTEAD = {
    "make test": "make --dry-run test",
    "make serve": "make --dry-run serve",
    ".venv/bin/python -m pytest -m slow": ".venv/bin/python -m pytest -m slow --collect-only",
}

# Replaces the container engine: checks that a target exists, and runs the command with the paths outside.
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


def commands(page, language="bash"):
    """Line by line, continuations joined, without comments."""
    lines = "".join(blocks(page, language)).replace("\\\n", " ").splitlines()
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
        if entry.name not in ("chat", "test"):
            (folder / ".venv" / entry.name).symlink_to(entry)
    for stamp in ("chat", "test"):
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
        # Standard input has a prompt for generate.py without --prompt.
        [*kind, command], cwd=folder, input="def f(x):\n", capture_output=True, text=True, timeout=900,
        env=environment(folder),
    )  # fmt: skip


def environment(folder):
    return {**os.environ, "PATH": f"{folder.parent}/bin:{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_works_as_printed(page, checkout):
    """Guards against a command that fails. Later commands of a page use files of earlier ones. There is no
    network: the only model of the hub that pages name is a local folder here.
    """
    address = "http://127.0.0.1:8000"
    with ExitStack() as server:
        for command in commands(page):
            command = INSTEAD.get(command, command)
            if re.search(r"(python|torchrun.*) serve\.py", command):
                server.close()  # that of an earlier command
                here = f'cd {checkout}; exec env PATH={environment(checkout)["PATH"]} {command} "$@"'
                address = server.enter_context(started("serve.py", ["bash", "-c", here, "bash"]))
                continue
            result = run(command.replace("http://127.0.0.1:8000", address), checkout)
            assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_every_example_in_python_runs(page, checkout):
    """Guards against an example that fails or warns."""
    result = run("".join(blocks(page, "python")), checkout, "python")
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr


@pytest.mark.parametrize("page", ALL)
def test_every_link_leads_somewhere(page):
    """Guards against a page, a picture or a heading that was moved or deleted."""
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if heading else []
        anchors = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
        assert not heading or heading in anchors, target


def notebook_cells(root):
    cells = json.loads((root / NOTEBOOK).read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def texts(cell):
    return "".join(line for output in cell["outputs"] for line in output.get("text", []))


def test_the_notebook_is_read_without_running_it():
    """Guards against a cell without output, a path of one machine, and a file too large to open quickly."""
    cells = notebook_cells(ROOT)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(cell["outputs"] for cell in cells)
    assert not re.search(r"(^|\s)/\w", "".join(map(texts, cells)))
    assert (ROOT / NOTEBOOK).stat().st_size < 400_000


@pytest.mark.slow
def test_the_notebook_prints_what_it_shows(checkout):
    """Guards against a cell that fails, and outputs of other cells or another model. Cells with times run."""
    result = run(f".venv/bin/python docs/run_notebook.py {NOTEBOOK}", checkout)
    assert result.returncode == 0, result.stderr
    for stored, now in zip(notebook_cells(ROOT), notebook_cells(checkout), strict=True):
        assert [output["output_type"] for output in now["outputs"]] == [
            output["output_type"] for output in stored["outputs"]
        ]
        if "timed" not in stored["metadata"]["tags"]:
            assert texts(now) == texts(stored)


def test_the_readme_links_every_page():
    """Guards against a page that nobody finds."""
    text = (ROOT / "README.md").read_text()
    assert [page for page in PAGES if page != "README.md" and f"({page})" not in text] == []


def test_the_readme_lists_every_family_and_its_drafts():
    """Guards against a list that promises drafts which the code refuses, or forgets a family."""
    rows = re.findall(
        r"^\| (.+) \| (first layers.*) \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    listed = {name: (drafts, layers) for names, drafts, layers in rows for name in names.split(", ")}
    assert listed == {
        name: (
            "first layers, n-grams" + ", copies in four bits" * is_dense(kind),
            "ours" if kind in LLAMA_LAYOUT else "of transformers",
        )
        for kind, name in FAMILIES.items()
    }


@pytest.mark.parametrize("page", ALL)
def test_examples_import_names_that_are_there(page):
    """Guards against a module or a name in an example that was renamed, without running it."""
    cells = ["".join(cell["source"]) for cell in notebook_cells(ROOT)]
    for node in ast.walk(ast.parse("\n".join(cells if page == NOTEBOOK else blocks(page, "python")))):
        if isinstance(node, ast.ImportFrom) and (ROOT / node.module.partition(".")[0]).is_dir():
            module = importlib.util.find_spec(node.module)
            assert module is not None, node.module
            path = Path(module.origin)
            known = path.read_text() + " ".join(other.stem for other in path.parent.glob("*.py"))
            assert [name.name for name in node.names if not re.search(rf"\b{name.name}\b", known)] == []


PROGRAMS = [path.relative_to(ROOT) for path in ROOT.rglob("*.py") if ".venv" not in path.parts]


@pytest.mark.parametrize("page", ALL)
def test_every_program_that_a_page_names_is_there(page):
    """Guards against the name of a module that was renamed or deleted, and one that the tree lacks."""
    names = set(re.findall(r"[\w/.-]+\.py\b", (ROOT / page).read_text())) - {"X.py"}
    assert [name for name in names if not any(f"/{path}".endswith(f"/{name}") for path in PROGRAMS)] == []
    if page == "CONTRIBUTING.md":
        others = ("tests", "docs", "eval_tasks", "checkpoints", "build")
        modules = {path.name for path in PROGRAMS if path.parts[0] not in others}
        assert modules - {"__init__.py"} - {name.rpartition("/")[2] for name in names} == set()


def test_pages_and_the_makefile_name_flags_and_values_of_scripts():
    """Guards against a removed flag or choice, in the examples of --help too, without running the command.
    Commands in `sh` blocks need programs or data that are not here.
    """
    for page in [*PAGES, *CARDS]:
        for command in [*commands(page), *commands(page, "sh")]:
            check_flags(command)
    for script in ROOT.glob("*.py"):
        text = ast.get_docstring(ast.parse(script.read_text())) or ""
        for command in re.findall(r"^    (.*\.py .*)$", text, re.MULTILINE):
            check_flags(command)
    shown = subprocess.run(
        ["make", "--dry-run", "demo", "chat", "serve"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    lines = [
        line for line in shown.replace("\\\n", " ").splitlines() if re.search("(generate|serve).py", line)
    ]
    assert len(lines) == 3
    for line in lines:
        check_flags(line.replace("'", " ").replace(";", " "))  # commands in a nested shell, too


def check_flags(command):
    """In one test, since some scripts take seconds to import."""
    words = shlex.split(command)
    programs = [word.endswith(".py") and "tests" not in word and (ROOT / word).is_file() for word in words]
    for script in [i for i, is_program in enumerate(programs) if is_program]:
        given, text = words[script + 1 :], usage(words[script])
        known = {"help", *re.findall(r"--(\w+)", text)}
        assert {word[2:] for word in given if word.startswith("--")} <= known, command
        for flag, choices in re.findall(r"--(\w+) \{([^}]+)\}", text):
            values = {value for word, value in itertools.pairwise(given) if word == f"--{flag}"}
            assert values <= {*choices.split(",")}, command


@cache
def usage(script):
    """The output of --help all."""
    output = io.StringIO()
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {spec.name: module}), patch.object(sys, "path", [*sys.path]):
        spec.loader.exec_module(module)
        with redirect_stdout(output), pytest.raises(SystemExit, match="0"):
            module.main(["--help", "all"])
    return output.getvalue()
