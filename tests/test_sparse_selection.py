# SPDX-License-Identifier: Apache-2.0
"""Sparse models in vLLM's configuration: which class serves, what is refused and why, what fp8 and pages become."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402

from evals.models.sparse_probe import ProbeConfig, hf_config  # noqa: E402
from vllm_fusedmla import backend, compat, envs, plugin, sparse_backend  # noqa: E402

if not current_platform.is_cpu():
    pytest.skip("needs vLLM's CPU build", allow_module_level=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(hf_config(ProbeConfig(), torch.bfloat16)))
    return folder


def engine_config(folder: Path, **options: Any) -> Any:
    plugin.register()
    arguments = {"attention_backend": "FUSEDMLA", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True}
    return EngineArgs(model=str(folder), skip_tokenizer_init=True, **(arguments | options)).create_engine_config()


@pytest.fixture
def vllm_config(model_folder: Path) -> Iterator[Any]:
    config = engine_config(model_folder)
    with set_current_vllm_config(config):
        yield config


class TestSelection:
    """One name for dense and sparse layers."""

    @staticmethod
    def choose(**changes: Any) -> str:
        plugin.register()
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        from vllm.v1.attention.selector import AttentionSelectorConfig

        asked: dict[str, Any] = {"head_size": 576, "dtype": torch.bfloat16, "kv_cache_dtype": "auto"}
        asked |= {"block_size": None, "use_mla": True, "use_sparse": True}
        config = AttentionSelectorConfig(**{**asked, **changes})
        return current_platform.get_attn_backend_cls(AttentionBackendEnum["FUSEDMLA"], config)

    @pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_ds_mla"])
    def test_sparse_layers_get_the_sparse_class(self, kv_cache_dtype: str) -> None:
        assert self.choose(kv_cache_dtype=kv_cache_dtype, block_size=128, use_dcp=True) == plugin.SPARSE_CLASS_PATH
        assert self.choose(kv_cache_dtype=kv_cache_dtype, use_sparse=False) == plugin.CLASS_PATH

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"head_size": 512}, "head size 512 is not 576"),
            ({"block_size": 16}, r"page size \(--block-size\) 16 is not a multiple of 64"),
            ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache dtype fp8_e5m2 is none of auto, bfloat16"),
            ({"kv_cache_dtype": "fp8", "dtype": torch.float16}, "fp8_ds_mla .* needs a bfloat16 model, not float16"),
            ({"has_sink": True}, "sinks"),
            ({"use_pcp": True}, "PCP"),
        ],
    )
    def test_refusals_say_why(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=f"FUSEDMLA cannot serve this configuration: .*{words}"):
            self.choose(**changes)

    def test_a_cache_in_host_memory_is_refused(self, vllm_config: Any) -> None:
        vllm_config.attention_config.hisparse_config = SimpleNamespace()
        with pytest.raises(ValueError, match="HiSparse"):
            self.choose()

    def test_refusals_on_gpus(self, vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def reason(major: int = 9) -> str | None:
            return sparse_backend.FusedMLASparseBackend.supports_combination(
                576, torch.bfloat16, "auto", None, True, False, True, False, DeviceCapability(major, 0)
            )

        on_a_gpu = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
        for module in (backend, sparse_backend):
            monkeypatch.setattr(module, "current_platform", on_a_gpu)
        monkeypatch.delenv("VLLM_FUSEDMLA_INDEXER", raising=False)
        monkeypatch.setattr(compat, "has_deep_gemm", lambda: True)
        assert reason() is None and reason(10) is None
        monkeypatch.setattr(compat, "batch_invariant", lambda: True)
        assert reason() == (
            "batch-invariant mode needs VLLM_FUSEDMLA_INDEXER=1, because the order of vLLM's top-k varies"
        )
        monkeypatch.setenv("VLLM_FUSEDMLA_INDEXER", "1")
        assert reason() is None
        assert "cannot read the cache of compute capability 10" in str(reason(10))
        vllm_config.model_config.hf_text_config.index_topk = 100
        assert reason() == "index_topk 100 is not a multiple of 64"


@pytest.mark.parametrize(("asked", "cache"), [("auto", "auto"), ("fp8", "fp8_ds_mla"), ("fp8_ds_mla", "fp8_ds_mla")])
def test_engine_configuration(model_folder: Path, asked: str, cache: str) -> None:
    config = engine_config(model_folder, kv_cache_dtype=asked)
    assert config.cache_config.cache_dtype == cache
    assert config.cache_config.block_size == 64  # what the indexer's cache needs
    assert config.attention_config.backend.name == "FUSEDMLA"


def test_configuration_of_dense_models_and_of_other_backends_stays(model_folder: Path, tmp_path: Path) -> None:
    other = engine_config(model_folder, kv_cache_dtype="fp8", attention_backend="CPU_MLA")
    assert other.cache_config.cache_dtype == "fp8"
    dense = json.loads((model_folder / "config.json").read_text())
    dense = {key: value for key, value in dense.items() if not key.startswith("index_")}
    dense |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    config = engine_config(tmp_path, kv_cache_dtype="fp8")
    assert config.cache_config.cache_dtype == "fp8" and config.cache_config.block_size == 16


def test_drafters_cache_and_other_models() -> None:
    def config(**text: Any) -> Any:
        drafter = SimpleNamespace(kv_cache_dtype="fp8")
        model = SimpleNamespace(hf_text_config=SimpleNamespace(**text))
        cache = SimpleNamespace(cache_dtype="auto")
        return SimpleNamespace(model_config=model, cache_config=cache, speculative_config=drafter)

    sparse = config(index_topk=2048, kv_lora_rank=512)
    compat.use_fp8_ds_mla(sparse)
    assert (sparse.cache_config.cache_dtype, sparse.speculative_config.kv_cache_dtype) == ("auto", "fp8_ds_mla")
    assert compat.is_sparse_model(sparse)
    assert not compat.is_sparse_model(config(kv_lora_rank=512))
    assert not compat.is_sparse_model(config(index_topk=512))  # DeepSeek-V4


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_FUSEDMLA_INDEXER", raising=False)
    assert envs.VLLM_FUSEDMLA_INDEXER == "auto"
    monkeypatch.setenv("VLLM_FUSEDMLA_INDEXER", "yes")
    with pytest.raises(ValueError, match="VLLM_FUSEDMLA_INDEXER must be one of auto, 0, 1, got 'yes'"):
        _ = envs.VLLM_FUSEDMLA_INDEXER
