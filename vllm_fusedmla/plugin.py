# SPDX-License-Identifier: Apache-2.0
"""Entry points by which vLLM finds the backend. Importing this module imports neither torch nor vLLM.

vLLM calls `register` (group ``vllm.general_plugins``) in every process before it parses the command line or builds an
engine, and `early_hook` (group ``vllm.platform_plugins``) when it first asks which platform it is on. Both may run many
times. What they set up:

* the name FUSEDMLA in vLLM's table of attention backends, with a reducer that lets a spawned process unpickle a
  configuration holding it before that process has loaded its plugins;
* a wrapper of the platform's ``get_attn_backend_cls``: MLA layers get this project's class after it has validated the
  configuration, other layers of the same model (a drafter's, say) get the platform's own choice;
* a wrapper of the platform's ``check_and_update_config``: for models with an indexer it settles the KV cache's format,
  and on the CPU platform, which otherwise prepares for vLLM's own MLA backends, pages and operators;
* where DeepGEMM is missing, or if asked for, this project's kernels in vLLM's indexer.
"""

from __future__ import annotations

import copyreg
import logging
from typing import Any

from . import compat, envs

NAME = "FUSEDMLA"
CLASS_PATH = "vllm_fusedmla.backend.FusedMLABackend"
SPARSE_CLASS_PATH = "vllm_fusedmla.sparse_backend.FusedMLASparseBackend"
_WRAPPED = "_fusedmla_wrapped"

# Below vLLM's own logger, whose handlers and level it takes; before vLLM has set that up, it only prints warnings.
logger = logging.getLogger("vllm.vllm_fusedmla.plugin")
_said: set[str] = set()


def _say_once(level: int, message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


def _supported() -> bool:
    reason = compat.vllm_unsupported_reason()
    if reason is not None:
        _say_once(logging.WARNING, reason)
    return reason is None


def restore(name: str) -> Any:
    """Unpickle a member of vLLM's backend table that this plugin added, adding it first where it is missing."""
    _add_name()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[name]


def _reduce(member: Any) -> Any:
    # Enums pickle by value, and an unknown value fails in a process that has not loaded plugins yet.
    return (restore, (member.name,)) if member.name == NAME else member.__reduce_ex__(2)


def _add_name() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if NAME not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(NAME, CLASS_PATH)
    copyreg.pickle(AttentionBackendEnum, _reduce)


def early_hook() -> None:
    """Add the name before vLLM's general plugins load; claims no platform, so it returns None.

    A configuration given as ``attention_config={"backend": "FUSEDMLA"}`` is checked that early.
    """
    if _supported():
        _add_name()


def register() -> None:
    """Make ``--attention-backend FUSEDMLA`` available in this process. Does nothing outside the supported versions."""
    if not _supported():
        return
    import vllm.envs
    from vllm.platforms import current_platform

    _add_name()
    envs.register(vllm.envs.environment_variables)
    platform = type(current_platform)
    _wrap_selection(platform)
    _wrap_config(platform)
    if current_platform.is_cuda() and offers_indexer():
        from . import indexer

        indexer.install()


def offers_indexer() -> bool:
    """Whether vLLM's indexer is to run this project's kernels on a GPU."""
    choice = envs.VLLM_FUSEDMLA_INDEXER
    return choice == "1" or (choice == "auto" and not compat.has_deep_gemm())


def refusal(reasons: list[str]) -> str:
    """The sentence that a user reads where FUSEDMLA cannot serve a configuration."""
    reason = "; ".join(reasons)
    return f"FUSEDMLA cannot serve this configuration: {reason}. Without --attention-backend vLLM picks another."


def _backend_class(use_sparse: bool) -> tuple[Any, str]:
    """The class that serves dense or sparse layers under the one name, and its path."""
    if use_sparse:
        from .sparse_backend import FusedMLASparseBackend

        return FusedMLASparseBackend, SPARSE_CLASS_PATH
    from .backend import FusedMLABackend

    return FusedMLABackend, CLASS_PATH


def _wrap_selection(platform: Any) -> None:
    """Wrap ``platform.get_attn_backend_cls``, once."""
    original = platform.get_attn_backend_cls.__func__
    if getattr(original, _WRAPPED, False):
        return

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if getattr(selected_backend, "name", None) != NAME:
            return original(cls, selected_backend, attn_selector_config, *args, **kwargs)
        if not attn_selector_config.use_mla:
            return original(cls, None, attn_selector_config, *args, **kwargs)
        backend, path = _backend_class(attn_selector_config.use_sparse)
        capability = cls.get_device_capability()
        reasons = backend.validate_configuration(device_capability=capability, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(refusal(reasons))
        _say_once(logging.INFO, f"Using FUSEDMLA backend{' for sparse attention' * attn_selector_config.use_sparse}.")
        return path

    setattr(get_attn_backend_cls, _WRAPPED, True)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def selected_for_mla(vllm_config: Any) -> bool:
    """Whether the configuration names FUSEDMLA, for the whole model or for its MLA layers."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(getattr(attention, "backend_per_kind", None) or {}).values()]
    model = vllm_config.model_config
    return any(getattr(c, "name", None) == NAME for c in chosen) and model is not None and bool(model.use_mla)


def _wrap_config(platform: Any) -> None:
    """Wrap the platform's ``check_and_update_config``, once."""
    original = platform.check_and_update_config.__func__
    if getattr(original, _WRAPPED, False):
        return

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        if not selected_for_mla(vllm_config):
            return original(cls, vllm_config)
        from vllm.platforms import current_platform

        sparse = compat.is_sparse_model(vllm_config)
        if sparse:
            compat.use_fp8_ds_mla(vllm_config)
        if not current_platform.is_cpu():
            return original(cls, vllm_config)
        with compat.present_as_cpu_mla(vllm_config):
            original(cls, vllm_config)
        compat.disable_cpu_rotary_op(vllm_config)
        if sparse and not vllm_config.cache_config.user_specified_block_size:
            vllm_config.cache_config.block_size = 64  # the indexer's only page size

    setattr(check_and_update_config, _WRAPPED, True)
    platform.check_and_update_config = classmethod(check_and_update_config)
