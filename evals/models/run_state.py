# SPDX-License-Identifier: Apache-2.0
"""What the training commands share: a log that survives a restart, a clock that counts training time, saved states."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

SAVE_EVERY_SECONDS = 60.0


def fused_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Only kernels that keep no matrix of scores, on a GPU."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])


@contextlib.contextmanager
def precision(device: torch.device) -> Iterator[None]:
    """bfloat16 autocast and fused attention on a GPU (vLLM will compute in bfloat16 too), float32 on a CPU."""
    if device.type != "cuda":
        yield
        return
    with torch.autocast("cuda", torch.bfloat16), fused_attention(device):
        yield


def adamw(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """The optimizer of training from nothing: weight decay for matrices only."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() == 2]
    vectors = [p for p in parameters if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=parameters[0].is_cuda)


def answer_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, rate: float, ids: torch.Tensor, answer_tokens: int
) -> tuple[float, float]:
    """One step of training on the last `answer_tokens` of each row of `ids` ``[b, tokens]``.

    Returns:
        Loss, and the share of answer tokens that the model found most probable.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    answer = ids[:, -answer_tokens:]
    with precision(ids.device):
        logits = model(ids[:, :-1], last=answer_tokens).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), answer.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), float((logits.argmax(-1) == answer).float().mean())


class Run:
    """One training run: its log, its clock and its state file, with which a run that was cut off goes on.

    folder: of the checkpoint; the log is training_log.jsonl there. minutes: training time, restarts not counted.
    state: file of the state, several times the checkpoint's size; None: the run cannot be resumed.
    """

    def __init__(self, folder: Path, minutes: float, state: Path | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._state, self.minutes = state, minutes
        self.saved: dict[str, Any] | None = None
        if state is not None and state.exists():
            self.saved = torch.load(state, map_location="cpu", weights_only=False)
        self._spent = self.saved["seconds"] if self.saved else 0.0
        self._start = self._last_save = time.monotonic()
        self._file = (folder / "training_log.jsonl").open("a" if self.saved else "w")
        if self.saved:
            self.log(event="resumed")

    @property
    def seconds(self) -> float:
        return self._spent + time.monotonic() - self._start

    @property
    def fraction(self) -> float:
        """Share of the training time that is over, at most 1."""
        return min(1.0, self.seconds / (60 * self.minutes))

    def log(self, **record: Any) -> None:
        """Add a record to the log, and show it."""
        record["seconds"] = round(self.seconds, 1)
        line = json.dumps({name: round(v, 6) if isinstance(v, float) else v for name, v in record.items()})
        self._file.write(line + "\n")
        self._file.flush()
        print(line, flush=True)

    def maybe_save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save what `state` returns if the last time was a while ago."""
        if self._state is None or time.monotonic() - self._last_save < SAVE_EVERY_SECONDS:
            return
        self._state.parent.mkdir(parents=True, exist_ok=True)
        part = self._state.with_suffix(".part")
        torch.save(state() | {"seconds": self.seconds}, part)
        os.replace(part, self._state)  # a run that is cut off while it writes keeps the state before
        self._last_save = time.monotonic()

    def finish(self) -> None:
        """Forget the state: the run is complete."""
        if self._state is not None:
            self._state.unlink(missing_ok=True)
