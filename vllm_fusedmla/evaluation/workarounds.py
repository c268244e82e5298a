# SPDX-License-Identifier: Apache-2.0
"""What evaluations do because of particular versions of vLLM: each with its reason and when it goes."""

from __future__ import annotations

from typing import Any


def cpu_rotary_op(options: dict[str, Any]) -> dict[str, Any]:
    """Engine options with vLLM's rotary embedding for CPUs left out, for backends other than FUSEDMLA too.

    Reason: see `compat.disable_cpu_rotary_op`; other backends have nobody to do it. Goes: with that function.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return options
    compilation = dict(options.get("compilation_config") or {})
    compilation["custom_ops"] = [*compilation.get("custom_ops", ()), "-rotary_embedding"]
    return options | {"compilation_config": compilation}


def teacher_environment() -> dict[str, str]:
    """Environment of engines with `teacher.Teacher`: vLLM's first model runner.

    Reason: its second one, the default on GPUs, has another interface for logits processors, not the same in 0.32 and
    0.33; which runner prepares a batch makes no difference to attention.
    Goes: when 0.32 leaves the supported range, with a processor of the new interface.
    """
    return {"VLLM_USE_V2_MODEL_RUNNER": "0"}
