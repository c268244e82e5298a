# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_fusedmla.compat prepare-cpu-env``."""

import sys

from . import prepare_cpu_env

if sys.argv[1:] != ["prepare-cpu-env"]:
    raise SystemExit("usage: python -m vllm_fusedmla.compat prepare-cpu-env")
prepare_cpu_env()
