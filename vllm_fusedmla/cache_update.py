# SPDX-License-Identifier: Apache-2.0
"""Storing a step's tokens in the latent cache, alike for dense and sparse layers."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

from .kernels import layout


class StoresTokens:
    """Mixin, to stand before vLLM's implementation class, whose `do_kv_cache_update` it calls on GPUs."""

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        *rest: Any,
        **options: Any,
    ) -> None:
        """Store the step's tokens: vLLM's kernel on GPUs, PyTorch on CPUs. vLLM 0.33 adds the argument skip_scale."""
        if not current_platform.is_cpu():
            super().do_kv_cache_update(  # type: ignore[misc]
                kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, *rest, **options
            )
        elif kv_cache.numel() > 0:
            rows = torch.cat([kv_c_normed, k_pe.squeeze(1)], dim=-1)
            layout.write_cache(rows, slot_mapping, kv_cache, k_scale)
