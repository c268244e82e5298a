# SPDX-License-Identifier: Apache-2.0
"""The indexer's kernels that are compared: this project's, DeepGEMM's scores, and the top-k of vLLM and FlashInfer.

Called as vLLM 0.33 calls them (model_executor/layers/sparse_attn_indexer.py and indexer_topk.py). DeepGEMM's schedule
is made once a step for all layers, so it is made beforehand.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.indexer_cases import PAGE_SIZE, IndexerInputs, PagedInputs, RaggedInputs, TopkInputs
from benchmarks.providers.base import Unavailable, Unsupported, version

_WORKSPACE_BYTES = 1 << 20  # vLLM's RADIX_TOPK_WORKSPACE_SIZE


class IndexerProvider:
    """Base of all. `prepare` returns a call that runs the kernel and returns scores or indices, see `indexer_cases`."""

    name = ""
    kinds: tuple[str, ...] = ("paged", "ragged", "topk")
    slack = 4.0
    """Factor on the allowed error of scores: peers are not under test."""

    def runs_on_cpu(self) -> bool:
        return False

    def load(self) -> str:
        """Import what is needed; the version as text. Raises `Unavailable`."""
        raise NotImplementedError

    def prepare(self, x: IndexerInputs) -> Callable[[], torch.Tensor]:
        """Everything but the timed call."""
        raise NotImplementedError


class FusedMLA(IndexerProvider):
    """This project's kernels. Scores past a row's keys are not written, as the peers do not."""

    name = "fusedmla"
    slack = 1.0

    def runs_on_cpu(self) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    def load(self) -> str:
        try:
            from vllm_fusedmla.kernels import indexer, topk
        except ImportError as error:
            raise Unavailable(f"vllm_fusedmla does not import: {error}") from error
        self._indexer, self._topk = indexer, topk
        import vllm_fusedmla

        return f"vllm_fusedmla {vllm_fusedmla.__version__}"

    def prepare(self, x: IndexerInputs) -> Callable[[], torch.Tensor]:
        case, device = x.case, x.lengths.device
        if isinstance(x, TopkInputs):
            out = torch.empty(case.rows, case.topk, dtype=torch.int32, device=device)
            workspace, logits = self._topk.topk_workspace(case.rows, device), x.logits
            return lambda: self._topk.topk_indices(logits, x.lengths, case.topk, out=out, workspace=workspace)
        out = self._indexer.empty_logits(case.rows, case.kv, device)
        if isinstance(x, PagedInputs):
            paged = (x.q.unsqueeze(1), x.cache, x.weights, x.lengths, x.block_table, case.kv)
            return lambda: self._indexer.index_logits_paged(*paged, clean=False, out=out)
        ragged = (x.q, x.k, x.k_scales, x.weights, x.starts, x.lengths)
        return lambda: self._indexer.index_logits_ragged(*ragged, max_len=case.kv, clean=False, out=out)


class PortableTopk(FusedMLA):
    """This project's Triton top-k, also where another kernel is preferred."""

    name = "fusedmla-portable"
    kinds = ("topk",)

    def prepare(self, x: IndexerInputs) -> Callable[[], torch.Tensor]:
        assert isinstance(x, TopkInputs)
        case, device, logits = x.case, x.lengths.device, x.logits
        out = torch.empty(case.rows, case.topk, dtype=torch.int32, device=device)
        workspace = self._topk.topk_workspace(case.rows, device)
        parts = self._topk.programs_per_row(case.rows, case.kv, device)
        options = {"out": out, "workspace": workspace, "parts": parts}
        return lambda: self._topk.topk_indices(logits, x.lengths, case.topk, **options)


class DeepGemm(IndexerProvider):
    """DeepGEMM's fp8_paged_mqa_logits and fp8_mqa_logits through vLLM, which compiles them when first called."""

    name = "deepgemm"
    kinds = ("paged", "ragged")

    def load(self) -> str:
        try:
            from vllm.utils import deep_gemm
            from vllm.utils.import_utils import has_deep_gemm

            names = ("fp8_fp4_paged_mqa_logits", "fp8_fp4_mqa_logits", "get_paged_mqa_logits_metadata")
            self._paged, self._ragged, self._schedule = (getattr(deep_gemm, name) for name in names)
        except Exception as error:
            raise Unavailable(f"vLLM's DeepGEMM does not import: {error}") from error
        if not has_deep_gemm():
            raise Unavailable("DeepGEMM is not installed")
        return version("vllm")

    def prepare(self, x: IndexerInputs) -> Callable[[], torch.Tensor]:
        if isinstance(x, RaggedInputs):
            ragged = ((x.q, None), (x.k, x.k_scales), x.weights, x.starts, x.lengths, x.case.kv)
            return lambda: self._ragged(*ragged)
        assert isinstance(x, PagedInputs)
        lens = x.lengths.unsqueeze(1)
        num_sms = torch.cuda.get_device_properties(lens.device).multi_processor_count
        schedule = self._schedule(lens, PAGE_SIZE, num_sms)
        query = (x.q.unsqueeze(1), None)
        paged = (query, x.cache.unsqueeze(-2), x.weights, lens, x.block_table, schedule, x.case.kv)
        return lambda: self._paged(*paged)


class VllmTopk(IndexerProvider):
    """One of vLLM's top-k operators; vLLM takes the cooperative one for up to 64 rows."""

    kinds = ("topk",)
    operator = ""

    def load(self) -> str:
        try:
            from vllm import _custom_ops

            if not torch.cuda.is_available():
                raise Unavailable("needs a CUDA device")
            self._ops = _custom_ops
            if self.operator and not hasattr(torch.ops._C, self.operator):
                raise Unavailable(f"this vLLM has no {self.operator}")
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"vLLM's operators do not import: {error}") from error
        return version("vllm")

    def prepare(self, x: IndexerInputs) -> Callable[[], torch.Tensor]:
        assert isinstance(x, TopkInputs)
        case, device, logits = x.case, x.lengths.device, x.logits
        if case.topk not in (512, 1024, 2048):
            raise Unsupported("topk 512, 1024 or 2048 only")
        out = torch.empty(case.rows, case.topk, dtype=torch.int32, device=device)
        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        select, lens = getattr(torch.ops._C, self.operator), x.lengths.unsqueeze(1)

        def call() -> torch.Tensor:
            select(logits, lens, out, workspace, case.topk, case.kv)
            return out

        return call


class VllmCooperativeTopk(VllmTopk):
    name = "vllm-cooperative"
    operator = "cooperative_topk"


class VllmPersistentTopk(VllmTopk):
    name = "vllm-persistent"
    operator = "persistent_topk"


class VllmPerRowTopk(VllmTopk):
    name = "vllm-per-row"

    def prepare(self, x: IndexerInputs) -> Callable[[], torch.Tensor]:
        assert isinstance(x, TopkInputs)
        case, logits, lens = x.case, x.logits, x.lengths.unsqueeze(1)
        out = torch.empty(case.rows, case.topk, dtype=torch.int32, device=lens.device)

        def call() -> torch.Tensor:
            self._ops.top_k_per_row_decode(logits, 1, lens, out, case.rows, *logits.stride(), case.topk)
            return out

        return call


class FlashInferTopk(IndexerProvider):
    """FlashInfer's top-k, which vLLM offers as an option."""

    name = "flashinfer"
    kinds = ("topk",)

    def load(self) -> str:
        try:
            import flashinfer
            from flashinfer.topk import top_k_ragged_transform
        except Exception as error:
            raise Unavailable(f"flashinfer does not import: {error}") from error
        self._select = top_k_ragged_transform
        return f"flashinfer {getattr(flashinfer, '__version__', '?')}"

    def prepare(self, x: IndexerInputs) -> Callable[[], torch.Tensor]:
        assert isinstance(x, TopkInputs)
        logits, offsets = x.logits, torch.zeros_like(x.lengths)
        return lambda: self._select(logits, offsets, x.lengths, x.case.topk)


class Reference(IndexerProvider):
    """Eager PyTorch, to try the program out on a CPU."""

    name = "reference"
    slack = 1.0

    def runs_on_cpu(self) -> bool:
        return True

    def load(self) -> str:
        from vllm_fusedmla.kernels import indexer_reference

        self._ops: Any = indexer_reference
        return f"torch {torch.__version__}"

    def prepare(self, x: IndexerInputs) -> Callable[[], torch.Tensor]:
        case = x.case
        if isinstance(x, TopkInputs):
            logits = x.logits
            return lambda: self._ops.topk_indices(logits, x.lengths, case.topk)
        if isinstance(x, PagedInputs):
            paged = (x.q.unsqueeze(1), x.cache, x.weights, x.lengths, x.block_table, case.kv)
            return lambda: self._ops.index_logits_paged(*paged)
        ragged = (x.q, x.k, x.k_scales, x.weights, x.starts, x.lengths)
        return lambda: self._ops.index_logits_ragged(*ragged, max_len=case.kv)


ALL: dict[str, type[IndexerProvider]] = {
    provider.name: provider
    for provider in (
        FusedMLA,
        PortableTopk,
        DeepGemm,
        VllmCooperativeTopk,
        VllmPersistentTopk,
        VllmPerRowTopk,
        FlashInferTopk,
        Reference,
    )
}
DEFAULT = tuple(name for name in ALL if name != "reference")
