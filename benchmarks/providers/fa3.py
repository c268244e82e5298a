# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-3 with its separate latent query, in vLLM's build."""

from benchmarks.cases import D_V
from benchmarks.inputs import Inputs
from benchmarks.providers.base import Prepared, Provider, Unavailable, flat, version


class FlashAttention3(Provider):
    """FlashAttention-3 with a separate value part of the query, as vLLM's FLASH_ATTN_MLA backend calls it.

    `max_splits` 0 lets FA3 choose the number of splits (vLLM without full CUDA graphs); 32 is vLLM's default bound
    with them.
    """

    name = "fa3"
    timed_schedule = False
    max_splits = 0

    def load(self) -> str:
        try:
            from vllm.v1.attention.backends import fa_utils

            if not fa_utils.flash_attn_supports_mla():
                raise Unavailable("vLLM's FlashAttention does not support MLA on this device")
            self._decode = fa_utils.flash_attn_varlen_func
            self._metadata = fa_utils.get_scheduler_metadata
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"vLLM's FlashAttention does not import: {error}") from error
        return version("vllm")

    def prepare(self, x: Inputs) -> Prepared:
        case = x.case
        rows = x.q.view(case.b * case.s_q, case.h_q, -1)
        q_nope, q_rope = rows[..., :D_V].contiguous(), rows[..., D_V:].contiguous()
        latent, rope = x.cache[..., :D_V].unsqueeze(-2), x.cache[..., D_V:].unsqueeze(-2)
        starts = x.query_start()

        def build():
            return self._metadata(
                batch_size=case.b,
                max_seqlen_q=case.s_q,
                max_seqlen_k=x.max_len,
                num_heads_q=case.h_q,
                num_heads_kv=1,
                headdim=rope.shape[-1],
                cache_seqlens=x.seq_lens,
                qkv_dtype=x.q.dtype,
                headdim_v=D_V,
                page_size=case.page_size,
                cu_seqlens_q=starts,
                causal=True,
                num_splits=self.max_splits,
            )

        prebuilt = build()

        def call():
            return self._decode(
                q=q_rope,
                k=rope,
                v=latent,
                q_v=q_nope,
                max_seqlen_q=case.s_q,
                cu_seqlens_q=starts,
                max_seqlen_k=x.max_len,
                seqused_k=x.seq_lens,
                block_table=x.block_table,
                softmax_scale=x.sm_scale,
                causal=True,
                return_softmax_lse=True,
                fa_version=3,
                scheduler_metadata=build() if self.timed_schedule else prebuilt,
                num_splits=self.max_splits,
            )

        def unpack(result):
            return flat(x, result[0], result[1].transpose(0, 1))  # its lse is [h_q, rows]

        return Prepared(call, unpack, "timed" if self.timed_schedule else "prebuilt")


class FlashAttention3Splits32(FlashAttention3):
    name = "fa3-splits32"
    max_splits = 32


class FlashAttention3Schedule(FlashAttention3):
    name = "fa3-schedule"
    timed_schedule = True
