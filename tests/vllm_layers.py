# SPDX-License-Identifier: Apache-2.0
"""vLLM's surroundings of an attention layer, for tests without a model. Import it where vLLM is installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from vllm_fusedmla import plugin

DIMS = {"kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128}


def engine_config(folder: Path, **options: Any) -> Any:
    """vLLM's configuration for the model in `folder`, with FUSEDMLA."""
    plugin.register()
    arguments = {"attention_backend": "FUSEDMLA", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True}
    return EngineArgs(model=str(folder), skip_tokenizer_init=True, **(arguments | options)).create_engine_config()


def impl_arguments(heads: int, scale: float, kv_cache_dtype: str, q_lora_rank: int | None) -> dict[str, Any]:
    """What a layer gives the implementation of its attention."""
    return DIMS | {
        "num_heads": heads,
        "head_size": 576,
        "scale": scale,
        "num_kv_heads": 1,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": kv_cache_dtype,
        "logits_soft_cap": None,
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
        "q_lora_rank": q_lora_rank,
        "qk_head_dim": 128,
        "kv_b_proj": None,
    }


def make_builder(builder: Any, config: Any, heads: int, page: int, kv_cache_dtype: str, q_lora_rank: int | None) -> Any:
    """A metadata builder of class `builder` for one layer."""
    prefill = SimpleNamespace(get_name=lambda: "none", prepare_metadata=lambda meta: None)
    prefill.clone = lambda: prefill
    layer = SimpleNamespace(**DIMS, q_lora_rank=q_lora_rank, num_heads=heads, prefill_backend=prefill)
    config.compilation_config.static_forward_context["attn"] = layer
    dtype = torch.uint8 if kv_cache_dtype.startswith("fp8") else torch.bfloat16
    spec = MLAAttentionSpec(block_size=page, num_kv_heads=1, head_size=576, dtype=dtype, cache_dtype_str=kv_cache_dtype)
    return builder(spec, ["attn"], config, torch.device("cpu"))


def step(
    query_lens: list[int], seq_lens: list[int], pages: int, num_tokens: int | None = None
) -> CommonAttentionMetadata:
    """A step as vLLM's runner describes it, three pages a request; those of query length 0 and length 0 are padding."""
    b = len(seq_lens)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=b,
        num_actual_tokens=num_tokens or int(starts[-1]),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.randperm(pages - 1)[: b * 3].reshape(b, 3).to(torch.int32) + 1,
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
    )
