# SPDX-License-Identifier: Apache-2.0
"""Environment variables of this plugin, read when they are used.

``from vllm_fusedmla import envs; envs.VLLM_FUSEDMLA_KERNEL`` reads the environment then, as ``vllm.envs`` does.
`register` adds the variables to vLLM's own table, so that vLLM passes them to its workers, makes them part of its
compilation cache's key, and does not warn about unknown variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .kernels.select import MAX_S_Q

if TYPE_CHECKING:
    VLLM_FUSEDMLA_KERNEL: str
    VLLM_FUSEDMLA_DECODE_THRESHOLD: int
    VLLM_FUSEDMLA_FP8_MMA: bool
    VLLM_FUSEDMLA_INDEXER: str


def _choice(name: str, default: str, choices: tuple[str, ...]) -> Callable[[], str]:
    def read() -> str:
        value = os.environ.get(name, default).strip().lower()
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return value

    return read


def _integer(name: str, default: int, low: int, high: int) -> Callable[[], int]:
    def read() -> int:
        text = os.environ.get(name, str(default))
        if not text.strip().isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"{name} must be an integer from {low} to {high}, got {text!r}")
        return int(text)

    return read


def _flag(name: str, default: bool) -> Callable[[], bool]:
    read = _choice(name, str(int(default)), ("0", "1"))
    return lambda: read() == "1"


VARIABLES: dict[str, Callable[[], Any]] = {
    # Which implementation decodes: `auto` takes the best kernel for the GPU, and the PyTorch reference on a CPU;
    # `portable` takes the Triton kernel on Hopper too; `reference` takes the PyTorch reference everywhere, which on a
    # GPU is slow and rules CUDA graphs out. The last two are there to tell a kernel's fault from a fault elsewhere.
    "VLLM_FUSEDMLA_KERNEL": _choice("VLLM_FUSEDMLA_KERNEL", "auto", ("auto", "portable", "reference")),
    # Requests with up to this many new tokens go to the decode kernel, longer ones to vLLM's prefill.
    "VLLM_FUSEDMLA_DECODE_THRESHOLD": _integer("VLLM_FUSEDMLA_DECODE_THRESHOLD", MAX_S_Q, 1, MAX_S_Q),
    # Whether fp8 tensor cores may multiply: on Hopper, for caches of --kv-cache-dtype fp8 and more than 32 query rows
    # (heads x new tokens) a request. Query and softmax weights are then rounded to e4m3, each by up to 2^-4 of itself,
    # and output and log-sum-exp are that much less exact.
    "VLLM_FUSEDMLA_FP8_MMA": _flag("VLLM_FUSEDMLA_FP8_MMA", False),
    # Whose indexer picks the keys of sparse attention on a GPU: 1 takes this project's scores and top-k, 0 vLLM's, of
    # which the scores need DeepGEMM and for it a CUDA compiler; `auto` takes vLLM's, but this project's scores where
    # DeepGEMM is not installed. Holds for every attention backend of the process.
    "VLLM_FUSEDMLA_INDEXER": _choice("VLLM_FUSEDMLA_INDEXER", "auto", ("auto", "0", "1")),
}


def count_dir() -> Path | None:
    """Folder in which each process keeps count of the tokens it decodes (`counts`), from FUSEDMLA_COUNT_DIR.

    Not one of vLLM's variables: those are part of its compilation cache's key, and a folder of a run must not be.
    """
    folder = os.environ.get("FUSEDMLA_COUNT_DIR")
    return Path(folder) if folder else None


def register(table: MutableMapping[str, Callable[[], Any]]) -> None:
    """Add the variables to `table`, which is ``vllm.envs.environment_variables``."""
    table.update(VARIABLES)


def __getattr__(name: str) -> Any:
    try:
        read = VARIABLES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return read()


def __dir__() -> list[str]:
    return sorted([*globals(), *VARIABLES])
