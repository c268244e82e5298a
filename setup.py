# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels before the package is built; everything else is in pyproject.toml.

A step of its own in `build`, not a changed build_py: setuptools runs the steps for editable installs too, but forgives
a changed build_py every failure there. The cubins are written into the source tree, where they serve as package data
of a wheel, as an editable install's kernels, and as the next build's cache.

Where they cannot be compiled (no nvcc, no gcc) the package is installed without them and uses its portable kernels,
unless FUSEDMLA_REQUIRE_CUBINS=1.
"""

import os
import shutil
import subprocess
import sys

from setuptools import Command, setup
from setuptools.command.build import build
from setuptools.errors import ExecError

KERNELS = ("vllm_fusedmla", "kernels", "hopper")


class BuildCubins(Command):
    """What setuptools asks of a build step is in the docstring of setuptools.command.build.SubCommand."""

    description = "compile the CUDA kernels for sm_90a"
    user_options: list = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        # setuptools adds to what an earlier build left in build/lib, and a wheel takes all of it.
        shutil.rmtree(os.path.join(str(self.build_lib), *KERNELS, "cubin"), ignore_errors=True)
        script = os.path.join(*KERNELS, "build.py")
        done = subprocess.run([sys.executable, script, "--discard-stale"], stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return
        if os.environ.get("FUSEDMLA_REQUIRE_CUBINS", "0") == "1":
            raise ExecError(f"FUSEDMLA_REQUIRE_CUBINS=1: {done.stderr.strip()}")
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if line.startswith("cannot")), lines[-1])
        self.warn(f"the kernels for Hopper are left out, the portable ones will be used: {reason}")

    # Nothing is written into build_lib here: build_py takes the cubins as package data.
    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [("build_cubins", None), *build.sub_commands]


setup(cmdclass={"build": Build, "build_cubins": BuildCubins})
