# SPDX-License-Identifier: Apache-2.0
"""The kernels that are compared, behind one interface (`base`), a file a project."""

from benchmarks.providers.base import Prepared as Prepared
from benchmarks.providers.base import Provider
from benchmarks.providers.base import Unavailable as Unavailable
from benchmarks.providers.base import Unsupported as Unsupported
from benchmarks.providers.fa3 import FlashAttention3, FlashAttention3Schedule, FlashAttention3Splits32
from benchmarks.providers.flashinfer_fa3 import FlashInfer
from benchmarks.providers.flashmla import FlashMLA, FlashMLASchedule, SglFlashMLA
from benchmarks.providers.fusedmla import FusedMLA, FusedMLAFp8Mma, FusedMLANoSchedule
from benchmarks.providers.fusedmla import FusedMLAPortable as FusedMLAPortable
from benchmarks.providers.reference import Reference, SparseReference
from benchmarks.providers.sparse_fa3 import SparseFlashAttention3
from benchmarks.providers.sparse_flashinfer import SparseFlashInfer
from benchmarks.providers.sparse_flashmla import (
    SparseFlashMLA,
    SparseFlashMLAMixed,
    SparseFlashMLANative,
    SparseFlashMLASchedule,
    SparseSglFlashMLA,
)
from benchmarks.providers.sparse_fusedmla import SparseFusedMLA, SparseFusedMLAPortable, SparseFusedMLAPositions
from benchmarks.providers.triton_mla import TritonMLA

ALL: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (
        FusedMLA,
        FusedMLANoSchedule,
        FusedMLAPortable,
        FusedMLAFp8Mma,
        FlashMLA,
        FlashMLASchedule,
        SglFlashMLA,
        FlashAttention3,
        FlashAttention3Splits32,
        FlashAttention3Schedule,
        FlashInfer,
        TritonMLA,
        Reference,
    )
}
SPARSE: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (
        SparseFusedMLA,
        SparseFusedMLAPositions,
        SparseFusedMLAPortable,
        SparseFlashMLA,
        SparseFlashMLASchedule,
        SparseFlashMLAMixed,
        SparseFlashMLANative,
        SparseSglFlashMLA,
        SparseFlashAttention3,
        SparseFlashInfer,
        SparseReference,
    )
}
"""What serves the sparse cases of these names; a name may be in one table or in both."""
DEFAULT = ("fusedmla", "fusedmla-portable", "flashmla", "fa3", "flashinfer", "triton_mla")
DEFAULT_SPARSE = (
    "fusedmla", "fusedmla-portable", "flashmla", "flashmla-mixed", "flashmla-native", "fa3", "flashinfer",
)  # fmt: skip
FALLBACKS = {"flashmla": "sgl-flashmla", "flashmla-schedule": "sgl-flashmla"}
"""What stands in for a provider that is not available."""
