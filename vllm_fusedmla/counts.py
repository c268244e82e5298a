# SPDX-License-Identifier: Apache-2.0
"""How many tokens this process has decoded, and with which kernel: proof for evaluations that FUSEDMLA did the work.

The counts are kept where a step's metadata is built, which runs in every step, also where CUDA graphs are replayed and
no layer's Python runs. With FUSEDMLA_COUNT_DIR set they are also in a file of that folder, at any time and whatever way
the process ends: vLLM's workers are often killed, so nothing could be written at their exit.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
from collections import Counter
from pathlib import Path

from . import envs

_FILE_BYTES = 4096


class DecodeCounter:
    """Tokens that this process has sent through `forward_mqa` of one of the impls, over all layers.

    Under full CUDA graphs Python runs when a graph is captured, not when it is replayed: then `tokens` counts the
    warm-up and the captures. Metadata builders run in every step, so `scheduled` and `by_kernel` go on counting; they
    count a graph's padding too, and a builder that captures.

    Attributes:
        name: "dense" or "sparse".
        tokens: see above.
        scheduled: tokens of the steps' metadata.
        by_kernel: decoded tokens of the steps' metadata, by `DecodeConfig.kernel`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokens = 0
        self.scheduled = 0
        self.by_kernel: Counter[str] = Counter()

    def record(self, kernel: str, tokens: int) -> None:
        """A step decodes `tokens` tokens with `kernel`."""
        if tokens:
            self.by_kernel[kernel] += tokens
            _publish(self.name, self.by_kernel)


class _CountFile:
    """A file of this process's counts: one JSON object, spaces after it."""

    def __init__(self, folder: Path) -> None:
        self.pid = os.getpid()
        self.counts: dict[str, dict[str, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{socket.gethostname()}-{self.pid}.json"
        path.write_bytes(b"{}".ljust(_FILE_BYTES))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _FILE_BYTES)

    def write(self, name: str, counts: Counter[str]) -> None:
        self.counts[name] = dict(counts)
        self._memory[:] = json.dumps(self.counts).encode().ljust(_FILE_BYTES)


_file: _CountFile | None = None


def _publish(name: str, counts: Counter[str]) -> None:
    global _file
    folder = envs.count_dir()
    if folder is None:
        return
    if _file is None or _file.pid != os.getpid():  # a forked process has a file of its own
        _file = _CountFile(folder)
    _file.write(name, counts)


def read_counts(folder: Path) -> dict[str, int]:
    """Tokens by kernel, such as ``{"dense twowg": 4096}``, over all processes that count in `folder`.

    Ranks of tensor parallelism each count the same tokens.
    """
    total: Counter[str] = Counter()
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        for name, counts in json.loads(path.read_text()).items():
            total.update({f"{name} {kernel}": tokens for kernel, tokens in counts.items()})
    return dict(total)
