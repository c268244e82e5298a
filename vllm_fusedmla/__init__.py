# SPDX-License-Identifier: Apache-2.0
"""FUSEDMLA: multi-head latent attention (MLA) decode kernels as a vLLM attention backend.

Importing this package imports nothing else: vLLM loads plugins in every process, some of them before they fork, and
an import of torch there would cost seconds and could initialise CUDA too early. The public functions live in
``vllm_fusedmla.ops``.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
