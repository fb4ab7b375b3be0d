"""A wheel has the operators of a CPU built in: who installs it needs no compiler.

They use the interface that torch keeps stable, so one file is for all versions of Python and torch.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildOperators(build_py):
    """Needs torch, so `pip wheel --no-build-isolation`, and a compiler; else the wheel is built without."""

    def run(self) -> None:
        super().run()
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
