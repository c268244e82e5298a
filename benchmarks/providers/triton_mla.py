# SPDX-License-Identifier: Apache-2.0
"""vLLM's TRITON_MLA."""

import torch

from benchmarks.cases import D_V
from benchmarks.inputs import Inputs
from benchmarks.providers.base import Prepared, Provider, Unavailable, Unsupported, flat, version


class TritonMLA(Provider):
    """vLLM's portable Triton kernel, as its TRITON_MLA backend calls it, with that backend's number of splits."""

    name = "triton_mla"
    dtypes: tuple[str, ...] = ("bf16", "fp8")

    def load(self) -> str:
        try:
            from vllm.v1.attention.backends.mla.triton_mla import _compute_num_kv_splits
            from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd
        except Exception as error:
            raise Unavailable(f"vLLM's Triton MLA does not import: {error}") from error
        self._splits, self._decode = _compute_num_kv_splits, decode_attention_fwd
        return version("vllm")

    def prepare(self, x: Inputs) -> Prepared:
        case, device = x.case, x.q.device
        if case.h_q == 1:
            raise Unsupported("one head takes another kernel of vLLM's")
        rows = x.q.view(case.b * case.s_q, case.h_q, -1)
        splits = self._splits(x.max_len, torch.cuda.get_device_properties(device).multi_processor_count)
        partial = torch.empty(*rows.shape[:2], splits, D_V + 1, dtype=torch.float32, device=device)
        cache = x.cache.unsqueeze(2)

        def call():
            # The backend allocates and zeroes its results, and widens the block table for s_q > 1, in every layer.
            out = torch.zeros(*rows.shape[:2], D_V, dtype=x.q.dtype, device=device)
            lse = torch.zeros(rows.shape[:2], dtype=x.q.dtype, device=device)
            table, lens = x.block_table, x.seq_lens
            if case.s_q > 1:
                table = table.repeat_interleave(case.s_q, dim=0)
                offsets = torch.arange(1 - case.s_q, 1, device=device, dtype=lens.dtype)
                lens = (lens.unsqueeze(1) + offsets).flatten().clamp(min=0)
            self._decode(
                rows,
                cache,
                cache[..., :D_V],
                out,
                lse,
                table,
                lens,
                partial,
                splits,
                x.sm_scale,
                case.page_size,
                k_scale=x.k_scale,
                v_scale=x.k_scale,
                is_mla=True,
            )
            return out, lse

        return Prepared(call, lambda r: flat(x, r[0], r[1].float()), "none", config=f"{splits} splits")
