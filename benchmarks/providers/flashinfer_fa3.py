# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's FA3 kernels for MLA."""

import torch

from benchmarks.cases import D_V
from benchmarks.inputs import Inputs
from benchmarks.providers.base import Prepared, Provider, Unavailable, flat


class FlashInfer(Provider):
    """FlashInfer's FA3 MLA kernels; an fp8 cache is converted to bf16 inside the kernel."""

    name = "flashinfer"
    dtypes: tuple[str, ...] = ("bf16", "fp8")
    _workspace: torch.Tensor | None = None

    def load(self) -> str:
        try:
            import flashinfer
            from flashinfer.mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata
        except Exception as error:
            raise Unavailable(f"flashinfer does not import: {error}") from error
        if torch.cuda.get_device_capability()[0] != 9:
            raise Unavailable("FlashInfer's fa3 backend is for Hopper only")
        self._wrapper, self._plan_metadata = BatchMLAPagedAttentionWrapper, MLAPlanMetadata
        return f"flashinfer {getattr(flashinfer, '__version__', '?')}"

    def prepare(self, x: Inputs) -> Prepared:
        case = x.case
        if self._workspace is None:
            self._workspace = torch.empty(256 << 20, dtype=torch.uint8, device=x.q.device)
        pages = case.pages()
        page_start = torch.tensor([0, *pages], dtype=torch.int32, device=x.q.device).cumsum(0, dtype=torch.int32)
        page_list = torch.cat([x.block_table[row, :count] for row, count in enumerate(pages)])
        wrapper = self._wrapper(self._workspace, backend="fa3")
        wrapper.plan(
            metadata=self._plan_metadata.csr(x.query_start(), page_start, page_list, x.seq_lens),
            num_heads=case.h_q,
            head_dim_ckv=D_V,
            head_dim_kpe=x.q.shape[-1] - D_V,
            page_size=case.page_size,
            causal=True,
            sm_scale=x.sm_scale,
            q_data_type=x.q.dtype,
            kv_data_type=x.cache.dtype,
            query_layout="split",
            kv_cache_layout="split",
            lse_mode="basee",
        )
        rows = x.q.view(case.b * case.s_q, case.h_q, -1)
        query = (rows[..., :D_V].contiguous(), rows[..., D_V:].contiguous())
        cache = (x.cache[..., :D_V], x.cache[..., D_V:])
        out = torch.empty_like(query[0])
        lse = torch.empty(rows.shape[:2], dtype=torch.float32, device=x.q.device)
        scales = {}
        if x.dtype == "fp8":
            scales = {"ckv_scale": float(x.k_scale), "kpe_scale": float(x.k_scale)}

        def call():
            return wrapper.run(
                query=query, kv_cache=cache, out=out, lse=lse, return_lse=True, return_lse_base_on_e=True, **scales
            )

        return Prepared(call, lambda result: flat(x, result[0], result[1]), "host")
