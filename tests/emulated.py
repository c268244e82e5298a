# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels on a CPU: compiled by the host's compiler against `emulator/`, which stands in for the PTX.

Shows that a kernel computes the right thing and does not hang, in random interleavings of its warps and copies. Shows
nothing about the GPU's memory model, its proxies, or speed. `topk.cu` is not covered.
"""

import ctypes
import itertools
import os
import shutil
import struct
import subprocess
from pathlib import Path

import torch

from vllm_fusedmla.kernels.hopper.variants import VARIANTS

KERNELS = Path(__file__).resolve().parent.parent / "kernels" / "hopper"
EMULATOR = Path(__file__).resolve().parent / "emulator"
COMPILER = os.environ.get("CXX", "g++")
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-w")
_DECLARATION = "extern __shared__ __align__(1024) uint8_t shared_memory[];"


class EmulationError(RuntimeError):
    """A kernel did what the hardware would not take, or hung."""


def usable() -> bool:
    """Whether there is a compiler."""
    return shutil.which(COMPILER) is not None


class Emulator:
    """In the place of `kernels.hopper.launch` for tensors on the CPU.

    Args:
        folder: where to compile; what is there already is used again.
        sources: the kernels.
        seed: decides the order of events, differently in every launch.
    """

    def __init__(self, folder: Path, sources: Path = KERNELS, seed: int = 0) -> None:
        self.folder, self.sources = folder, sources
        self.seeds = itertools.count(seed)
        self.num_sms = 132
        self.launched: list[str] = []

    def _compile(self, name: str) -> Path:
        library, code = self.folder / f"{name}.so", self.folder / "code"
        if library.exists():
            return library
        if not code.exists():
            code.mkdir(parents=True)
            for source in (*self.sources.glob("*.cuh"), *self.sources.glob("*.cu")):
                (code / source.name).write_text(source.read_text().replace(_DECLARATION, ""))
            for stand_in in EMULATOR.iterdir():
                shutil.copy(stand_in, code)
        variant, main = VARIANTS[name], code / f"{name}.cpp"
        main.write_text(f'#include "ptx_copy.cuh"\n#include "{variant.source}"\n#include "launch.hpp"\n')
        defines = [f"-D{key}={value}" for key, value in variant.defines.items()]
        done = subprocess.run([COMPILER, *_FLAGS, *defines, main, "-o", library], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} does not compile: {done.stderr}")
        return library

    # ---- the interface of launch.py ----

    def launch(self, name, params, grid, cluster=1, *, together=True) -> None:
        self.launched.append(name)
        seed = next(self.seeds)
        emulate = ctypes.CDLL(str(self._compile(name))).emulate
        emulate.restype = ctypes.c_char_p
        failure = emulate(ctypes.byref(params), *grid, VARIANTS[name].threads, cluster, ctypes.c_uint(seed))
        if failure:
            raise EmulationError(f"{name}, grid {grid}, seed {seed}: {failure.decode()}")

    def counters(self, count: int) -> torch.Tensor:
        self.last_counters = torch.zeros(count, dtype=torch.int32)
        return self.last_counters

    def most_clusters(self, name: str, size: int, device: int) -> int:
        return self.num_sms // size

    def tensor_map(self, address, element_bytes, shape, strides, box, swizzle) -> bytes:
        none = [0] * (5 - len(shape))
        head = address, element_bytes, len(shape)
        return struct.pack("<Qii5Q4Q5ii16x", *head, *shape, *none, *strides, *none, *box, *none, swizzle)
