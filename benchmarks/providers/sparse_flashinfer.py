# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's FA3 kernels for MLA on pages of one token, as vLLM's FLASHINFER_MLA_SPARSE_SM90 uses them."""

import torch

from benchmarks.cases import D_QK, D_V
from benchmarks.inputs import Inputs
from benchmarks.providers.base import Prepared, flat, sparse_lists
from benchmarks.providers.flashinfer_fa3 import FlashInfer


class SparseFlashInfer(FlashInfer):
    """Planned on the host, outside the timed call; the lists are copied into the plan's page list there, too."""

    def prepare(self, x: Inputs) -> Prepared:
        case, device = x.case, x.q.device
        if self._workspace is None:
            self._workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        tokens, lists = case.b * case.s_q, sparse_lists(x)[1]
        topk = lists.shape[-1]
        starts = torch.arange(tokens + 1, dtype=torch.int32, device=device)
        length = torch.full((tokens,), topk, dtype=torch.int32, device=device)
        wrapper = self._wrapper(self._workspace, backend="fa3")
        wrapper.plan(
            metadata=self._plan_metadata.csr(starts, starts * topk, lists.flatten(), length),
            num_heads=case.h_q,
            head_dim_ckv=D_V,
            head_dim_kpe=D_QK - D_V,
            page_size=1,
            causal=False,
            sm_scale=x.sm_scale,
            q_data_type=x.q.dtype,
            kv_data_type=x.cache.dtype,
            query_layout="split",
            kv_cache_layout="split",
            lse_mode="basee",
        )
        rows = x.q.view(tokens, case.h_q, D_QK)
        query = (rows[..., :D_V].contiguous(), rows[..., D_V:].contiguous())
        pages = x.cache.view(-1, 1, D_QK)
        cache = (pages[..., :D_V], pages[..., D_V:])
        out = torch.empty_like(query[0])
        lse = torch.empty(rows.shape[:2], dtype=torch.float32, device=device)
        scales = {"ckv_scale": float(x.k_scale), "kpe_scale": float(x.k_scale)} if x.dtype == "fp8" else {}

        def call():
            return wrapper.run(
                query=query, kv_cache=cache, out=out, lse=lse, return_lse=True, return_lse_base_on_e=True, **scales
            )

        return Prepared(call, lambda result: flat(x, result[0], result[1]), "host")
