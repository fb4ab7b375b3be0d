"""Count what a reader has to learn: functions, classes and parameters of the product.

A change that needs more raises a limit and says in its message why the new concepts are worth it; a change
that needs fewer lowers the limit. Lines are not counted.
"""

import ast
import subprocess
import sys

LIMITS = {"functions": 1083, "classes": 209, "parameters": 2374}


def count() -> dict[str, int]:
    """Count over all tracked Python files but those of tests, benchmarks and pages."""
    listing = ["git", "ls-files", "*.py", ":!tests", ":!benchmarks", ":!docs", ":!.ci"]
    files = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    counts = dict.fromkeys(LIMITS, 0)
    for file in files:
        with open(file, encoding="utf-8") as source:
            tree = ast.parse(source.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                counts["classes"] += 1
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                counts["functions"] += 1
                counts["parameters"] += len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
    return counts


if __name__ == "__main__":
    exceeded = False
    for kind, number in count().items():
        print(f"{kind}: {number}, at most {LIMITS[kind]}")
        exceeded |= number > LIMITS[kind]
    sys.exit(exceeded)
