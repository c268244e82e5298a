# SPDX-License-Identifier: Apache-2.0
"""This project's sparse attention."""

import os
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.cases import D_QK, D_V
from benchmarks.inputs import Inputs
from benchmarks.providers.base import Prepared, Provider, Unavailable, Unsupported, sparse_lists

if TYPE_CHECKING:
    from vllm_fusedmla.kernels.sparse_plan import SparsePlan


class SparseFusedMLA(Provider):
    """This project's kernel, on slots of the cache as the peers have them."""

    name = "fusedmla"
    dtypes: tuple[str, ...] = ("bf16", "fp8", "fp8_ds_mla")
    strict = True

    def runs_on_cpu(self) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    def load(self) -> str:
        try:
            from vllm_fusedmla.kernels import sparse_convert, sparse_decode, sparse_plan
        except ImportError as error:
            raise Unavailable(f"vllm_fusedmla does not import: {error}") from error
        self._ops, self._plan, self._convert = sparse_decode, sparse_plan, sparse_convert.rows_to_bfloat16
        import vllm_fusedmla

        return f"vllm_fusedmla {vllm_fusedmla.__version__}"

    def plan_for(self, x: Inputs) -> "SparsePlan":
        """The kernel and launch shape for a case: what a server would get."""
        tokens = x.q.shape[:-2].numel()
        return self._plan.sparse_plan(x.case.h_q, x.dtype, x.q.device, prefill=x.case.prefill, tokens=tokens)

    def lists(self, x: Inputs) -> tuple[torch.Tensor, dict[str, Any]]:
        """Lists of keys, and the arguments that say what their entries mean."""
        return sparse_lists(x)[1], {}

    def prepare(self, x: Inputs) -> Prepared:
        case, device = x.case, x.q.device
        plan = self.plan_for(x)
        indices, meaning = self.lists(x)
        convert = case.prefill and plan.converts(x.dtype, case.b * case.s_q, x.max_len)
        if convert:  # as vLLM's backend does for long prompts
            indices, plan = sparse_lists(x)[0], self._plan.sparse_plan(case.h_q, "bf16", device, prefill=True)
            converted = torch.empty(x.max_len, D_QK, dtype=torch.bfloat16, device=device)
        shapes = plan.workspace_shapes(case.b, case.s_q, case.h_q)
        workspace = tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
        rows = (case.b, case.s_q, case.h_q)
        out = torch.empty(*rows, D_V, dtype=x.q.dtype, device=device)
        lse = torch.empty(rows, dtype=torch.float32, device=device)
        options = {"sm_scale": x.sm_scale, "k_scale": x.k_scale, "plan": plan, "workspace": workspace}
        if case.prefill:
            kv = x.cache.flatten(0, 1)
            results = {"out": out[0], "lse": lse[0], "with_max_logits": False}  # nor does vLLM look at FlashMLA's

            def call():
                keys = self._convert(x.cache, x.block_table[0], x.max_len, converted) if convert else kv
                return self._ops.mla_sparse_prefill(x.q[0], keys, indices[0], **options, **results)

        else:
            results = {"out": out, "lse": lse}

            def call():
                return self._ops.mla_sparse_decode(x.q, x.cache, indices, **meaning, **options, **results)

        chosen = plan.config
        config = (
            f"{chosen.kernel} {chosen.block_h}x{chosen.block_n} warps {chosen.num_warps} stages {chosen.num_stages} "
            f"programs/SM {chosen.programs_per_sm}{', rows converted to bf16' if convert else ''}"
        )
        return Prepared(call, lambda result: (out, lse), "none", config=config)


class SparseFusedMLAPositions(SparseFusedMLA):
    """The same on positions within requests and a block table: a server decodes what the indexer wrote as it is."""

    name = "fusedmla-positions"

    def lists(self, x: Inputs) -> tuple[torch.Tensor, dict[str, Any]]:
        if x.case.prefill:
            raise Unsupported("prefill reads slots")
        return sparse_lists(x)[0], {"block_table": x.block_table}


class SparseFusedMLAPortable(SparseFusedMLA):
    """The portable Triton kernel, also where a kernel for this very GPU would be chosen."""

    name = "fusedmla-portable"

    def plan_for(self, x: Inputs) -> "SparsePlan":
        return self._plan.sparse_plan(x.case.h_q, x.dtype, x.q.device, prefill=x.case.prefill, portable=True)
