# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-3 on pages of one token, whose block table is the list of keys: vLLM's FLASH_ATTN_MLA_SPARSE."""

import torch

from benchmarks.cases import D_QK, D_V
from benchmarks.inputs import Inputs
from benchmarks.providers.base import Prepared, Provider, Unavailable, flat, sparse_lists, version


class SparseFlashAttention3(Provider):
    """As that backend calls it: every token a request, no scheduler metadata, FA3 chooses the splits."""

    name = "fa3"

    def load(self) -> str:
        try:
            from vllm.v1.attention.backends import fa_utils
            from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

            if not fa_utils.flash_attn_supports_mla():
                raise Unavailable("vLLM's FlashAttention does not support MLA on this device")
            self._attend = flash_attn_varlen_func
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"vLLM's FlashAttention does not import: {error}") from error
        return version("vllm")

    def prepare(self, x: Inputs) -> Prepared:
        case, device = x.case, x.q.device
        tokens = case.b * case.s_q
        rows = x.q.view(tokens, case.h_q, D_QK)
        q_nope, q_rope = rows[..., :D_V].contiguous(), rows[..., D_V:].contiguous()
        cache = x.cache.view(-1, 1, 1, D_QK)
        starts = torch.arange(tokens + 1, dtype=torch.int32, device=device)
        lists = sparse_lists(x)[1].view(tokens, -1)
        length = torch.full((tokens,), lists.shape[1], dtype=torch.int32, device=device)

        def call():
            return self._attend(
                q=q_rope,
                k=cache[..., D_V:],
                v=cache[..., :D_V],
                q_v=q_nope,
                max_seqlen_q=1,
                cu_seqlens_q=starts,
                max_seqlen_k=lists.shape[1],
                seqused_k=length,
                block_table=lists,
                softmax_scale=x.sm_scale,
                causal=True,
                return_softmax_lse=True,
                fa_version=3,
            )

        def unpack(result):
            return flat(x, result[0], result[1].transpose(0, 1))  # its lse is [h_q, rows]

        return Prepared(call, unpack, "none")
