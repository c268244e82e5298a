# SPDX-License-Identifier: Apache-2.0
"""Teacher forcing inside vLLM: decode a given text one token a step, whatever the model would have said.

lm-eval's log-likelihoods come from the prefill of the whole text, which never runs a decode kernel. Here a logits
processor overrules the model's choice after its log-probabilities were taken, so the engine decodes the given text as
it decodes its own answers: any attention backend, batched, with or without CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

KEY = "fusedmla_teacher"
"""Name in `SamplingParams.extra_args` of the tokens to say, a list of ids."""


class Teacher(LogitsProcessor):
    """Leaves one token possible for each request that brings a text."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        # Of each batch row: the text, and the list of what has been said, which vLLM goes on filling.
        self._rows: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._text_of)

    @staticmethod
    def _text_of(params: Any, prompt: list[int] | None, said: list[int]) -> tuple[list[int], list[int]] | None:
        text = (params.extra_args or {}).get(KEY)
        return None if text is None else (text, said)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``[b, vocabulary]`` with -inf for all but the given token."""
        rows = [row for row, (text, said) in self._rows.items() if len(said) < len(text)]
        if rows:
            tokens = [self._rows[row][0][len(self._rows[row][1])] for row in rows]
            where = torch.tensor(rows, device=self._device)
            logits[where] = float("-inf")
            logits[where, torch.tensor(tokens, device=self._device)] = 0.0
        return logits
