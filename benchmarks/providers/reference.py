# SPDX-License-Identifier: Apache-2.0
"""The PyTorch reference, to try the program out on a CPU."""

import torch

from benchmarks.inputs import Inputs
from benchmarks.providers.base import Prepared, Provider, sparse_lists


class Reference(Provider):
    """The eager PyTorch oracle. Slow; it exists so that the program can be tried without a GPU."""

    name = "reference"
    dtypes: tuple[str, ...] = ("bf16", "fp8", "fp8_ds_mla")
    strict = True

    def runs_on_cpu(self) -> bool:
        return True

    def load(self) -> str:
        from vllm_fusedmla.kernels import reference

        self._decode = reference.mla_decode
        return f"torch {torch.__version__}"

    def prepare(self, x: Inputs) -> Prepared:
        def call():
            return self._decode(x.q, x.cache, x.block_table, x.seq_lens, sm_scale=x.sm_scale, k_scale=x.k_scale)

        return Prepared(call, lambda result: (result[0], result[1]), "none")


class SparseReference(Reference):
    """The same for sparse attention."""

    def load(self) -> str:
        from vllm_fusedmla.kernels import sparse_reference

        self._attend = sparse_reference.mla_sparse_decode
        return f"torch {torch.__version__}"

    def prepare(self, x: Inputs) -> Prepared:
        slots = sparse_lists(x)[1]

        def call():
            return self._attend(x.q, x.cache, slots, sm_scale=x.sm_scale, k_scale=x.k_scale)

        return Prepared(call, lambda result: (result[0], result[1]), "none")
