# SPDX-License-Identifier: Apache-2.0
"""Zeros that launches count arrivals in and leave at zero: launches that may run at the same time never share any."""

import torch

from ..common import next_power_of_2

_CHUNK = 1 << 20
_SMALLEST = 1 << 10


class CounterPool:
    """A device's counters, int32, zeroed once and handed out without a kernel, so that a graph capture records nothing.

    Launches of a stream run one after the other and share a slice. A captured graph may be replayed on any stream, so
    each capture gets slices of its own, one for each stream that takes part. Slices are never taken back: they are
    small, and nobody says when a graph is gone.
    """

    def __init__(self, device: torch.device) -> None:
        self.chunks: list[torch.Tensor] = []
        self._device = device
        self._free = torch.empty(0, dtype=torch.int32, device=device)
        self._slices: dict[tuple[int, int], torch.Tensor] = {}

    def reserve(self, count: int = _CHUNK) -> None:
        """Have `count` counters at hand. Allocates and waits for the device: not for use in a graph capture."""
        if self._free.numel() >= count:
            return
        chunk = torch.zeros(max(count, _CHUNK), dtype=torch.int32, device=self._device)
        if chunk.is_cuda:
            torch.cuda.current_stream(chunk.device).synchronize()  # any stream may use it from now on
        self.chunks.append(chunk)
        self._free = chunk

    def take(self, count: int, stream: int, capture: int | None) -> torch.Tensor:
        """At least `count` zeros for the next launch.

        Args:
            count: blocks of query rows in the batch.
            stream: of the launch.
            capture: 0, or the number of the graph capture that the stream takes part in, None if that is not known.
        """
        held = None if capture is None else self._slices.get((stream, capture))
        if held is not None and held.numel() >= count:
            return held
        size = next_power_of_2(max(count, _SMALLEST))
        if capture is None or (capture and self._free.numel() < size):
            # Becomes part of the graph, which then zeroes them at each replay: right, but a launch more.
            return torch.zeros(count, dtype=torch.int32, device=self._device)
        self.reserve(size)
        self._slices[stream, capture], self._free = self._free[:size], self._free[size:]
        return self._slices[stream, capture]
