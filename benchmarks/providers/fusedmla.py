# SPDX-License-Identifier: Apache-2.0
"""This project's kernels."""

import os
from typing import TYPE_CHECKING

import torch

from benchmarks.cases import D_V
from benchmarks.inputs import Inputs
from benchmarks.providers.base import Prepared, Provider, Unavailable, Unsupported

if TYPE_CHECKING:
    from vllm_fusedmla.kernels.plan import DecodePlan


class FusedMLA(Provider):
    """This project's kernel: schedule, split-KV decode and combine."""

    name = "fusedmla"
    dtypes: tuple[str, ...] = ("bf16", "fp8", "fp8_ds_mla")
    strict = True
    timed_schedule = True

    def runs_on_cpu(self) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    def load(self) -> str:
        try:
            from vllm_fusedmla.kernels import dense_decode, plan, schedule
        except ImportError as error:
            raise Unavailable(f"vllm_fusedmla does not import: {error}") from error
        self._decode, self._plan, self._schedule = dense_decode, plan, schedule
        import vllm_fusedmla

        return f"vllm_fusedmla {vllm_fusedmla.__version__}"

    def plan_for(self, x: Inputs) -> "DecodePlan":
        """The kernel and launch shape for a case: what a server gets that knows how long its longest request is."""
        return self._decode_plan(x)

    def _decode_plan(self, x: Inputs, fp8_mma: bool = False) -> "DecodePlan":
        tiles = self._plan.batch_tiles(x.case.b, max(x.case.seq_lens()))
        return self._plan.decode_plan(x.case.s_q, x.case.h_q, x.dtype, x.q.device, fp8_mma=fp8_mma, tiles=tiles)

    def prepare(self, x: Inputs) -> Prepared:
        case, device = x.case, x.q.device
        plan = self.plan_for(x)
        # The Hopper kernels schedule themselves inside the timed launch.
        tiles = None if plan.on_hopper else self._schedule.build_schedule(x.seq_lens, plan.params)
        shapes = plan.workspace_shapes(case.b, case.s_q, case.h_q)
        workspace = tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
        out = torch.empty(case.b, case.s_q, case.h_q, D_V, dtype=x.q.dtype, device=device)
        lse = torch.empty(case.b, case.s_q, case.h_q, dtype=torch.float32, device=device)

        def call():
            if self.timed_schedule and tiles is not None:
                self._schedule.build_schedule(x.seq_lens, plan.params, out=tiles)
            return self._decode.mla_decode(
                x.q,
                x.cache,
                x.block_table,
                x.seq_lens,
                sm_scale=x.sm_scale,
                k_scale=x.k_scale,
                plan=plan,
                schedule=tiles,
                workspace=workspace,
                out=out,
                lse=lse,
            )

        chosen = plan.config
        config = (
            f"{chosen.kernel} {chosen.block_h}x{chosen.block_n} warps {chosen.num_warps} stages {chosen.num_stages} "
            f"programs/SM {chosen.programs_per_sm}"
        )
        schedule = "timed" if self.timed_schedule or plan.on_hopper else "prebuilt"
        return Prepared(call, lambda result: (result[0], result[1]), schedule, config=config)


class FusedMLANoSchedule(FusedMLA):
    """The same with the schedule built beforehand, as vLLM does once a step for all layers."""

    name = "fusedmla-noschedule"
    timed_schedule = False


class FusedMLAPortable(FusedMLA):
    """The portable Triton kernel, also where a kernel for this very GPU would be chosen."""

    name = "fusedmla-portable"

    def plan_for(self, x: Inputs) -> "DecodePlan":
        from vllm_fusedmla.kernels.common import device_facts
        from vllm_fusedmla.kernels.select import select_portable

        rows = x.case.s_q * x.case.h_q
        arch, num_sms = device_facts(x.q.device)
        return self._plan.make_plan(select_portable(arch, rows, x.dtype), rows, num_sms, False)


class FusedMLAFp8Mma(FusedMLA):
    """The kernel of VLLM_FUSEDMLA_FP8_MMA=1, which rounds query and weights to e4m3 as FlashMLA's fp8 kernel does."""

    name = "fusedmla-fp8mma"
    dtypes = ("fp8",)
    strict = False  # held to what FlashMLA is held to

    def plan_for(self, x: Inputs) -> "DecodePlan":
        plan = self._decode_plan(x, fp8_mma=True)
        if plan == super().plan_for(x):
            raise Unsupported("the same kernel as fusedmla's")
        return plan

    def prepare(self, x: Inputs) -> Prepared:
        prepared = super().prepare(x)
        # As for FlashMLA, which is given an e4m3 query: the reference has the query that the kernel multiplies with.
        scale = 448.0 / x.q.float().abs().amax(-1, keepdim=True).clamp_min(1e-30)
        prepared.q = (x.q.float() * scale).to(torch.float8_e4m3fn).float() / scale
        return prepared
