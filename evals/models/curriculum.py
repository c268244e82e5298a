# SPDX-License-Identifier: Apache-2.0
"""What the demo model is trained on, step by step.

copy    repeat a part of a random sequence: the look-up that chains are made of, in its easiest form.
chain   chain recall, 6 links at first, more whenever recent batches are nearly right, up to 64; some copying too.
filler  64 links spread over contexts that double from 512 tokens to the longest; short chains throughout.
anneal  everything at once, all lengths, while the learning rate falls to nearly nothing.

Every promotion depends on accuracy over recent steps, never on time, so a slower machine takes the same steps.
"""

from __future__ import annotations

import copy
import math
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evals.models.batches import chain_batch, copy_batch
from evals.tasks.chain_recall import filler_for_length, total_tokens

STAGES = ("copy", "chain", "filler", "anneal")


@dataclass
class Curriculum:
    """Draws batches and moves through the stages.

    seed: fixes every size and token. tokens: about how many tokens a batch has (at least `min_batch` rows).
    max_links, max_total: where chains and contexts stop growing.
    """

    seed: int
    device: torch.device
    tokens: int
    max_links: int = 64
    max_total: int = 8192
    min_batch: int = 8
    stage: str = "copy"
    links: int = 6
    copy_length: int = 12
    total: int = 512
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=12))
    _counts: bool = False

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._generator = torch.Generator(device=self.device).manual_seed(self.seed)
        self.total = min(self.total, self.max_total)

    def batch(self) -> tuple[Tensor, int]:
        """The next batch: ids [b, length] int64 on the device, and how many tokens at the end are the answer."""
        rng = self._rng
        if self.stage == "copy" or (self.stage == "chain" and rng.random() < 0.2):
            self._counts = self.stage == "copy"
            length = rng.randint(self.copy_length // 2, self.copy_length)
            return copy_batch(self._rows(3 * length // 2), length, self._generator)
        if self.stage == "chain":
            self._counts = True
            return self._chain(rng.randint(max(4, self.links // 2), self.links), None)
        if rng.random() < 0.3:
            self._counts = False
            return self._chain(rng.choice((self.max_links, rng.randint(4, self.max_links))), None)
        links = rng.choice((self.max_links, rng.randint(8, self.max_links)))
        # Half of the contexts have the full length, the others anything up to it, short ones as often as long ones.
        self._counts = rng.random() < 0.5
        low = math.log(total_tokens(links, links))
        length = self.total if self._counts else round(math.exp(rng.uniform(low, math.log(self.total))))
        return self._chain(links, max(length, total_tokens(links, links)))

    def record(self, accuracy: float) -> str | None:
        """Note the accuracy of the last batch; returns a line of text when it led to a promotion."""
        if not self._counts:
            return None
        self._recent.append(accuracy)
        bar = {"copy": 0.9, "chain": 0.96, "filler": 0.97}.get(self.stage, 2.0)
        if len(self._recent) < 12 or sum(self._recent) / 12 < bar:
            return None
        self._recent.clear()
        if self.stage == "copy":
            self.stage = "chain"
        elif self.stage == "chain" and self.links < self.max_links:
            self.links = min(self.max_links, self.links * 3 // 2)
            self.copy_length = min(96, self.copy_length * 3 // 2)
        elif self.stage == "chain":
            self.stage = "filler"
        elif self.total < self.max_total:
            self.total = min(self.max_total, 2 * self.total)
        else:
            self.stage = "anneal"
        return f"{self.stage}: links {self.links}, total {self.total}"

    def state(self) -> dict[str, Any]:
        """Everything that decides the batches to come."""
        names = ("stage", "links", "copy_length", "total", "_recent", "_counts")
        generators = {"_rng": self._rng.getstate(), "_generator": self._generator.get_state().cpu()}
        return {name: copy.copy(getattr(self, name)) for name in names} | generators

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on the same kind of device."""
        for name, value in state.items():
            if name == "_rng":
                self._rng.setstate(value)
            elif name == "_generator":
                self._generator.set_state(value)
            else:
                setattr(self, name, copy.copy(value))

    def force_anneal(self) -> None:
        """Go to the last stage whatever has been learnt, because time is running out."""
        self.stage = "anneal"

    def _rows(self, length: int) -> int:
        return max(self.min_batch, self.tokens // length)

    def _chain(self, links: int, total: int | None) -> tuple[Tensor, int]:
        filler = 0 if total is None else filler_for_length(links, links, total)
        rows = self._rows(total_tokens(links, links, filler))
        return chain_batch(rows, links, links, filler, self._generator)
