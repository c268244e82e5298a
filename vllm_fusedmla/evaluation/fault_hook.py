# SPDX-License-Identifier: Apache-2.0
"""Injects a fault into the process that imports this: vLLM's worker, which does so before it loads the model.

The faults are in `evals/faults.py` of the project's source tree and not installed.
"""

from __future__ import annotations

import os
from importlib import import_module


class Extension:
    """vLLM's worker inherits from it; it has nothing to add."""


if _name := os.environ.get("FUSEDMLA_EVAL_FAULT"):
    import_module("evals.faults").inject(_name)
