"""Commands and examples of the pages work as printed, and their links lead somewhere."""

import ast
import importlib.util
import io
import itertools
import json
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

from arguments import GenerationConfig, ModelArguments, RunArguments, field_texts
from benchmarks.servers import started
from data import DataArguments
from self_speculation.config import default_model
from self_speculation.models.families import FAMILIES, LLAMA_LAYOUT

FILES = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))]
PAGES = sorted({*FILES} - {"CHANGELOG.md"})
# Commands of the following pages are not run: one takes two hours.
CARDS = ["CHANGELOG.md", "checkpoints/python-10m/README.md", "eval_tasks/README.md", "hub/README.md"]
NOTEBOOK = "docs/tour.ipynb"
ALL = [*PAGES, *CARDS, NOTEBOOK]
# These commands would start this test or not end.
INSTEAD = {
    "make test": "make --dry-run test",
    "make serve": "make --dry-run serve",
    ".venv/bin/python -m pytest -m slow": ".venv/bin/python -m pytest -m slow --collect-only",
}


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
    """A copy of the repository with this environment as .venv."""
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "logs", "__pycache__", ".*_cache")
    folder = Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored))
    for command in (["init", "--quiet"], ["add", "--all"]):  # tests look at all tracked files
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name not in ("chat", "test"):
            (folder / ".venv" / entry.name).symlink_to(entry)
    for stamp in ("chat", "test"):
        (folder / ".venv" / stamp).touch()
    shutil.copytree(default_model(), folder / "facebook" / "layerskip-llama2-7B")  # as if it were local
    return folder


def run(command, folder, language="bash"):
    kind = ["bash", "-e", "-o", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    return subprocess.run(
        # Standard input has a prompt for generate.py without --prompt.
        [*kind, command], cwd=folder, input="def f(x):\n", capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def without_docker(command, folder):
    """What a container runs, with the paths outside. To build an image leaves the files that it gets."""
    if command.startswith("docker build"):
        assert f" AS {command.split()[3]}\n" in (ROOT / "Dockerfile").read_text()
        lines = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"]
        kept = {path for line in lines for path in folder.glob(re.sub(r"/\*\*$", "/**/*", line))}
        for path in {*folder.rglob("*")} - kept:
            if path.is_file() and not {".venv", ".git", "facebook"} & {*path.relative_to(folder).parts}:
                path.unlink()
        return "true"
    if found := re.match("docker run (.*) self-speculation:(?:cpu|cuda) +(.*)", command):
        command = f'env PATH="{folder}/.venv/bin:$PATH" {found[2]}'
        for outside, inside in re.findall(r'-v "([^:"]+):([^:"]+)', found[1]):
            command = command.replace(inside, outside)
    return command


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_works_as_printed(page, checkout):
    """Guards against a command that fails. Later commands of a page use files of earlier ones."""
    address = "http://127.0.0.1:8000"
    with ExitStack() as server:
        for command in commands(page):
            command = without_docker(INSTEAD.get(command, command), checkout)
            if re.search(r"(python|torchrun.*) serve\.py", command):
                server.close()  # that of an earlier command
                here = f'cd {checkout}; exec env {command} "$@"'  # variables may come first
                address = server.enter_context(started("serve.py", ["bash", "-c", here, "bash"]))
                continue
            result = run(command.replace("http://127.0.0.1:8000", address), checkout)
            assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_every_example_in_python_runs(page, checkout):
    """Guards against an example that fails or warns, and output right below one that it does not print."""
    result = run("".join(blocks(page, "python")), checkout, "python")
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    shown = re.findall(r"```python\n[^`]*```\n\n```text\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert not shown or result.stdout == "".join(shown)


@pytest.mark.parametrize("page", ALL)
def test_every_link_leads_somewhere(page):
    """Guards against a page, a picture or a heading that was moved, and a page that nobody finds."""
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text())
    assert page != "README.md" or {*PAGES} - {page} <= {*targets}
    for target in [target for target in targets if not target.startswith("http")]:
        name, _, heading = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if heading else []
        anchors = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
        assert not heading or heading in anchors, target


@pytest.mark.slow
def test_the_notebook_prints_what_it_shows(checkout):
    """Guards against a cell that fails, and outputs of other cells or another model. Cells with times run."""
    result = run(f".venv/bin/python docs/run_notebook.py {NOTEBOOK}", checkout)
    assert result.returncode == 0, result.stderr
    stored, now = (json.loads((root / NOTEBOOK).read_text())["cells"] for root in (ROOT, checkout))
    for cells in zip(stored, now, strict=True):
        if cells[0]["cell_type"] == "code":
            shown, printed = (
                [(part["output_type"], part.get("text")) for part in cell["outputs"]] for cell in cells
            )
            is_timed = "timed" in cells[0]["metadata"]["tags"]
            assert [kind for kind, _ in printed] == [kind for kind, _ in shown] != []
            assert printed == shown or is_timed


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


PROGRAMS = [path.relative_to(ROOT) for path in ROOT.rglob("*.py") if ".venv" not in path.parts]


@pytest.mark.parametrize("page", ALL)
def test_every_program_that_a_page_names_is_there(page):
    """Guards against the name of a module that was renamed or deleted, and one that the tree lacks."""
    names = set(re.findall(r"[\w/.-]+\.py\b", (ROOT / page).read_text())) - {"X.py"}
    assert [name for name in names if not any(f"/{path}".endswith(f"/{name}") for path in PROGRAMS)] == []
    if page == "CONTRIBUTING.md":
        no_modules = ("tests", "docs", "eval_tasks", "checkpoints", "build")
        modules = {path.name for path in PROGRAMS if path.parts[0] not in no_modules}
        assert modules - {"__init__.py"} - {name.rpartition("/")[2] for name in names} == set()


def test_pages_and_the_makefile_name_flags_and_values_of_scripts():
    """Guards against a removed flag or choice, also in --help and where a command cannot run here."""
    make = ["make", "--dry-run", "demo", "chat", "serve"]
    shown = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = re.findall(r".*(?:generate|serve)\.py.*", shown.replace("\\\n", " "))
    assert len(found) == 3
    found = [re.sub("[';]", " ", line) for line in found]  # commands in a nested shell, too
    for page, kind in itertools.product([*PAGES, *CARDS], ("bash", "sh")):
        found += commands(page, kind)
    for script in ROOT.glob("*.py"):
        text = ast.get_docstring(ast.parse(script.read_text())) or ""
        found += re.findall(r"^    (.*\.py .*)$", text, re.MULTILINE)
    for command in found:
        words = shlex.split(command)
        for at, word in enumerate(words):
            if word.endswith(".py") and "tests" not in word and (ROOT / word).is_file():
                check_flags(words[at + 1 :], usage(word), command)


PROGRAMS_WITH_FLAGS = [
    "generate.py", "benchmark.py", "sweep.py", "correctness.py", "equality.py", "eval.py", "train.py",
    "serve.py",
    *(f"benchmarks/{name}.py" for name in ("side_by_side", "serving", "paper", "products", "synthetic")),
    "benchmarks/long_contexts.py", "benchmarks/variants.py",
]  # fmt: skip
# Of llama.cpp, docker, torchrun, accelerate and the hub's client.
FOREIGN_FLAGS = {
    "api-key", "draft-max", "grammar-file", "min-p", "mlock", "no-mmap", "repeat-penalty", "temp", "top-k",
    "top-p", "gpus", "ipc", "network", "shm-size", "stop-timeout", "user", "shutdown-timeout",
    "fsdp_offload_params", "num_machines", "local-dir",
}  # fmt: skip
# Of other libraries and of the paper's code base.
FOREIGN_NAMES = {
    "HF_TOKEN_PATH", "OPENAI_BASE_URL", "ChatOpenAI", "TextIteratorStreamer", "use_responses_api",
    "create_logits_processors", "create_stopping_criteria", "max_fn", "exit_query_cache",
    "get_valid_dataset_formats", "process_cli_arguments", "single_step_speculation",
    "_expand_mask", "_make_causal_mask", "_prepare_decoder_attention_mask",
}  # fmt: skip
OF_NOW = [page for page in [*PAGES, *CARDS] if page != "CHANGELOG.md"]  # that one has names of earlier times


def spans(page):
    """What stands between backticks in the running text of a page, and the comments of the Dockerfile."""
    text = (ROOT / page).read_text()
    if page == "Dockerfile":
        return re.findall("^#.*", text, re.MULTILINE)
    return re.findall("`([^`]+)`", re.sub("^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL))


@cache
def flags_of(program):
    return {"nosample", "no_sample", *re.findall(r"--(\w+)", usage(program))}


@pytest.mark.parametrize("page", [*OF_NOW, "Dockerfile"])
def test_flags_in_the_text_of_pages_exist(page):
    """Guards against a removed flag that a page recommends, and a flag of another script."""
    for span in spans(page):
        words = re.findall(r"[\w/]+\.py", span)
        named = [program for program in PROGRAMS_WITH_FLAGS if program in words]
        known = FOREIGN_FLAGS.union(*map(flags_of, named or PROGRAMS_WITH_FLAGS))
        assert {*re.findall(r"(?<![\w-])--([\w-]+)", span)} <= known, span


def test_help_sends_nobody_to_a_script_without_the_flag():
    """Guards against a text of a flag about a script that has lost it."""
    for group in (ModelArguments, GenerationConfig, DataArguments, RunArguments):
        for flag, text in field_texts(group).items():
            for script in re.findall(r"\b\w+\.py", text):
                assert flag in flags_of(script), (flag, script)


@cache
def source(pattern="*"):
    """All files that git tracks in this repository, but pages."""
    listing = ["git", "ls-files", pattern, ":!*.md", ":!checkpoints", ":!*.ipynb", ":!tests/test_pages.py"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return "\n".join((ROOT / name).read_text(errors="ignore") for name in names)


@pytest.mark.parametrize("page", OF_NOW)
def test_names_in_the_text_of_pages_exist(page):
    """Guards against a function or a field that was renamed, and one that moved to another file."""
    known = FOREIGN_NAMES | {path.stem for path in PROGRAMS} | {*re.findall(r"\w+", source())}
    words = {word for span in spans(page) for word in re.findall(r"(?<![\w./-])[A-Za-z_]\w*(?![\w-])", span)}
    words = {word for word in words if not word.endswith("_")}  # such as a prefix of names
    assert {word for word in words if "_" in word[1:] or re.search("[a-z][A-Z]", word)} <= known
    for name, file in re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.\w+)`", (ROOT / page).read_text()):
        assert name in source(f"*{file}"), (name, file)


def check_flags(words, text, command):
    known = {"help", *re.findall(r"--(\w+)", text)}
    assert {word[2:] for word in words if word.startswith("--")} <= known, command
    for flag, choices in re.findall(r"--(\w+) \{([^}]+)\}", text):
        values = {value for word, value in itertools.pairwise(words) if word == f"--{flag}"}
        assert values <= {*choices.split(",")}, command


@cache
def usage(script):
    """The output of --help all. Some scripts take seconds to import."""
    output = io.StringIO()
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {spec.name: module}), patch.object(sys, "path", [*sys.path]):
        spec.loader.exec_module(module)
        with redirect_stdout(output), pytest.raises(SystemExit, match="0"):
            module.main(["--help", "all"])
    return output.getvalue()
