"""A wheel has the operators of a CPU built in: who installs it needs no compiler. It also has equality.py.

The operators use the interface that torch keeps stable, so one file is for all versions of Python and torch.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# equality.py and all that it imports. In the package they are modules beside each other, as they are here.
COMMAND = [
    "equality.py", "arguments.py", "data.py",
    "measures/__init__.py", "measures/equality.py", "measures/openai_client.py", "measures/plots.py",
    "runs/__init__.py", "runs/failures.py", "runs/program.py", "runs/ranks.py", "runs/status.py",
]  # fmt: skip


class BuildOperators(build_py):
    """Needs torch, so `pip wheel --no-build-isolation`, and a compiler; else the wheel is built without."""

    def run(self) -> None:
        super().run()
        for name in COMMAND:
            target = Path(self.build_lib) / "self_speculation" / "command" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(name, str(target))
        sys.path.insert(0, str(Path(__file__).parent))
        try:
            from self_speculation.weights.kernels import build_into

            build_into(Path(self.build_lib) / "self_speculation" / "weights" / "cpp")
        except (ImportError, RuntimeError) as error:
            self.warn(f"without operators of a CPU: {error}")


class PlatformWheel(bdist_wheel):
    """For any Python, on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_py": BuildOperators, "bdist_wheel": PlatformWheel},
    has_ext_modules=lambda: True,  # the wheel depends on the platform
)
