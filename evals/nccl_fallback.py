# SPDX-License-Identifier: Apache-2.0
"""For vLLM's `worker_extension_cls`: reduce-scatter where vLLM's own NCCL binding is switched off.

vLLM 0.33 binds NCCL 2.29.7 or later. Beside an older one it disables that binding, and most collectives then go
through torch.distributed, but `CudaCommunicator.reduce_scatter`, with which decode context parallelism merges the
ranks' outputs, returns memory that nothing has written. Goes: when vLLM falls back there too, or the machines on which
`check_features` runs have that NCCL.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator


class WorkerExtension:
    """Adds nothing: naming it makes vLLM import this module in every worker."""


def binding_is_off(communicator: Any) -> bool:
    """Whether the communicator has no usable NCCL binding of vLLM's own."""
    binding = getattr(communicator, "pynccl_comm", None)
    return binding is None or binding.disabled


_bound = CudaCommunicator.reduce_scatter


def _reduce_scatter(self: Any, input_: Any, dim: int = -1) -> Any:
    if binding_is_off(self):
        return DeviceCommunicatorBase.reduce_scatter(self, input_, dim)
    return _bound(self, input_, dim)


CudaCommunicator.reduce_scatter = _reduce_scatter
