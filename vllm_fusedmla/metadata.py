# SPDX-License-Identifier: Apache-2.0
"""A step's metadata: vLLM's split into decodes and prefills, the decodes' launch plan and, if needed, tile schedule."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonDecodeMetadata,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport

from . import envs
from .counts import DecodeCounter
from .kernels.plan import DecodePlan, batch_tiles
from .kernels.schedule import ScheduleParams, TileSchedule, allocate_schedule, build_schedule
from .kernels.select import MAX_S_Q
from .limits import DecodeLimits, decode_threshold

decode_tokens = DecodeCounter("dense")


def uses_reference() -> bool:
    """Whether this process decodes with the PyTorch reference: on CPUs, or by VLLM_FUSEDMLA_KERNEL."""
    return current_platform.is_cpu() or envs.VLLM_FUSEDMLA_KERNEL == "reference"


@dataclasses.dataclass
class FusedMLADecodeMetadata(MLACommonDecodeMetadata):
    """A step's decode: vLLM's fields, the launch plan and the schedule.

    Without a plan the PyTorch reference decodes; a plan without a schedule is of a kernel that schedules itself.
    """

    plan: DecodePlan | None = None
    schedule: TileSchedule | None = None


@dataclasses.dataclass
class FusedMLAMetadata(MLACommonMetadata[FusedMLADecodeMetadata]):
    pass


class FusedMLAMetadataBuilder(MLACommonMetadataBuilder[FusedMLAMetadata]):
    """Builds a step's metadata, and with it the tile schedule that all layers of the step share.

    The Hopper kernels need none, and nothing is launched here for them. The portable kernel's lies in buffers that are
    allocated once per plan for the largest batch: CUDA graphs captured with one step's metadata find the next step's
    schedule at the same addresses.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.UNIFORM
    # Set per instance by `decode_threshold`. vLLM raises it to what speculative decoding needs, and lowers it to 1
    # under decode context parallelism.
    reorder_batch_threshold: int = MAX_S_Q

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.reorder_batch_threshold = decode_threshold()
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, FusedMLAMetadata)
        cache_dtype = getattr(kv_cache_spec, "cache_dtype_str", None) or vllm_config.cache_config.cache_dtype
        heads = self.num_heads * self.dcp_world_size
        self._limits = DecodeLimits.of(vllm_config, heads, cache_dtype, self.reorder_batch_threshold)
        self._schedules: dict[ScheduleParams, TileSchedule] = {}
        # The local lengths of decode context parallelism do not advance between draft steps.
        self.supports_draft_decode_metadata_update = self.dcp_world_size == 1
        if not uses_reference():
            self._limits.reserve_workspace(device)
            self._limits.warm_up(kv_cache_spec.block_size, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER if uses_reference() else cls._cudagraph_support  # the reference synchronises

    def _build_decode(
        self, block_table_tensor: torch.Tensor, seq_lens_device: torch.Tensor, **kwargs: Any
    ) -> FusedMLADecodeMetadata:
        common = super()._build_decode(block_table_tensor=block_table_tensor, seq_lens_device=seq_lens_device, **kwargs)
        metadata = FusedMLADecodeMetadata(**vars(common))
        num_tokens = kwargs["num_decode_tokens"]
        decode_tokens.scheduled += num_tokens
        if not uses_reference():
            # While a graph is captured, max_seq_len is the engine's.
            # Not max_query_len: a padded batch's tokens are num_requests x s_q, and that is how layers reshape them.
            s_q = max(num_tokens // seq_lens_device.shape[0], 1)
            tiles = batch_tiles(seq_lens_device.shape[0], kwargs["max_seq_len"])
            metadata.plan = self._limits.plan(s_q, self.device, tiles)
            if not metadata.plan.on_hopper:
                metadata.schedule = self._buffers(metadata.plan.params).narrow(seq_lens_device.shape[0])
                build_schedule(seq_lens_device, metadata.plan.params, metadata.schedule)
        decode_tokens.record("reference" if metadata.plan is None else metadata.plan.config.kernel, num_tokens)
        return metadata

    def _buffers(self, params: ScheduleParams) -> TileSchedule:
        if params not in self._schedules:
            self._schedules[params] = allocate_schedule(params, self._limits.requests, self.device)
        return self._schedules[params]

    def update_draft_decode_metadata(self, metadata: FusedMLAMetadata) -> None:
        """Schedule anew for sequence lengths that a drafter advanced on the device; safe inside a graph capture.

        The Hopper kernels read the lengths themselves.
        """
        decode = metadata.decode
        if decode is not None and decode.plan is not None and decode.schedule is not None:
            build_schedule(decode.seq_lens, decode.plan.params, decode.schedule)
