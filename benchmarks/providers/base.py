# SPDX-License-Identifier: Apache-2.0
"""The interface of all providers: `load` once, `prepare` a case, then time what it returns.

Split-KV kernels need a plan of which tiles go where. Whether building it is inside the timed call is a column of the
results (`schedule`): "timed", "prebuilt" on the device (what every layer but the first of a step sees), "host" (built
with a device synchronisation, so it cannot be inside), or "none".
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import D_V
from benchmarks.inputs import Inputs

Q_SCALE_FP8 = 0.137
"""Scale of an fp8 query, where a kernel needs one: 448 * 0.137 = 61, 6.1 standard deviations."""


class Unavailable(Exception):  # noqa: N818 - a state of the machine, not an error
    """The provider cannot run on this machine; the reason is the message."""


class Unsupported(Exception):  # noqa: N818
    """The provider does not take this case; the reason is the message."""


@dataclasses.dataclass
class Prepared:
    """A case ready to run.

    Attributes:
        call: runs the kernels on the current stream and returns what they wrote.
        unpack: turns that into out ``[b, s_q, h_q, 512]`` and lse ``[b, s_q, h_q]`` (natural logarithm).
        schedule: see the module.
        q: the query as the kernel sees it, if it quantises it; the reference must use the same.
        config: what the provider chose for this case, for the results.
    """

    call: Callable[[], Any]
    unpack: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
    schedule: str
    q: torch.Tensor | None = None
    config: str = ""


class Provider:
    """Base of all providers. `strict` ones are held to this project's tolerances, peers to looser ones."""

    name = ""
    dtypes: tuple[str, ...] = ("bf16",)
    strict = False

    def runs_on_cpu(self) -> bool:
        """Whether the provider runs without a GPU, for trying the program out."""
        return False

    def load(self) -> str:
        """Import what is needed; the version as text.

        Raises:
            Unavailable: it is not installed or does not run on this device.
        """
        raise NotImplementedError

    def prepare(self, x: Inputs) -> Prepared:
        """Everything but the timed call.

        Raises:
            Unsupported: the kernel does not take this case.
        """
        raise NotImplementedError


def version(*distributions: str) -> str:
    """Name and version of the first installed distribution."""
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return distributions[0]


def need_page_64(x: Inputs) -> None:
    if x.case.page_size != 64:
        raise Unsupported("page size 64 only")


def sparse_lists(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """A sparse case's lists of keys: positions within requests, and rows of the flattened cache."""
    assert x.indices is not None and x.slots is not None
    return x.indices, x.slots


def flat(x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Results over flattened query rows, [b * s_q, h_q, ...], as [b, s_q, h_q, ...]."""
    shape = (x.case.b, x.case.s_q, x.case.h_q)
    return out.view(*shape, D_V), lse.reshape(shape)


def fp8_query(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The query in e4m3, and the same values as a float tensor for the reference."""
    q = (x.q.float() / Q_SCALE_FP8).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return q, q.float() * Q_SCALE_FP8
