# SPDX-License-Identifier: Apache-2.0
"""What no layer of FUSEDMLA computes, dense or sparse: refused when the layer is built, not when a request comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.attention.backend import AttentionType

from .kernels import layout
from .kernels.select import MAX_H_Q


def refuse_unsupported(
    impl: Any,
    heads: int,
    alibi_slopes: list[float] | None,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    attn_type: str,
    more: Mapping[str, bool] | None = None,
) -> None:
    """Raise NotImplementedError for the first thing that a layer asks for and FUSEDMLA does not have.

    Args:
        impl: the layer's implementation, with its MLA sizes.
        heads: query heads that one rank attends with.
        alibi_slopes, sliding_window, logits_soft_cap, attn_type: as vLLM passes them.
        more: further things and whether they are asked for.
    """
    refused = {
        "alibi slopes": alibi_slopes,
        "a sliding window": sliding_window,
        "a logits soft cap": logits_soft_cap,
        f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
        f"kv_lora_rank {impl.kv_lora_rank} (512 only)": impl.kv_lora_rank != layout.D_V,
        f"{heads} query heads on one rank (at most {MAX_H_Q})": heads > MAX_H_Q,
        **(more or {}),
    }
    for what, present in refused.items():
        if present:
            raise NotImplementedError(f"FUSEDMLA does not support {what}")
