# SPDX-License-Identifier: Apache-2.0
"""The backend's classes inside vLLM's own builder and layer interfaces, without a model: cache write, metadata, decode.

Two paths: the CPU platform's (PyTorch reference) and the GPU's, whose kernels run here in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
import vllm_layers  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata, MLAAttentionImpl  # noqa: E402
from vllm.v1.worker import workspace  # noqa: E402

from vllm_fusedmla import backend, cache_update, compat, envs, limits, metadata  # noqa: E402
from vllm_fusedmla.kernels import hopper, layout, plan, select  # noqa: E402
from vllm_fusedmla.kernels.plan import make_plan  # noqa: E402
from vllm_fusedmla.kernels.select import MAX_S_Q  # noqa: E402

if not current_platform.is_cpu():
    pytest.skip("needs vLLM's CPU build", allow_module_level=True)

HEADS, PAGE, PAGES, SCALE = 4, 16, 25, 0.15
CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def vllm_config(model_folder: Path) -> Iterator[Any]:
    config = vllm_layers.engine_config(model_folder)
    with set_current_vllm_config(config):
        yield config


def make_impl(kv_cache_dtype: str = "auto", **changes: Any) -> backend.FusedMLAImpl:
    return backend.FusedMLAImpl(**{**vllm_layers.impl_arguments(HEADS, SCALE, kv_cache_dtype, None), **changes})


def make_builder(config: Any, kv_cache_dtype: str = "auto") -> metadata.FusedMLAMetadataBuilder:
    return vllm_layers.make_builder(metadata.FusedMLAMetadataBuilder, config, HEADS, PAGE, kv_cache_dtype, None)


def step(query_lens: list[int], seq_lens: list[int], num_tokens: int | None = None) -> CommonAttentionMetadata:
    return vllm_layers.step(query_lens, seq_lens, PAGES, num_tokens)


def filled_cache(common: CommonAttentionMetadata, kv_cache_dtype: str, k_scale: torch.Tensor) -> torch.Tensor:
    """A cache poisoned with NaN that holds each request's tokens, as vLLM stores it: uint8 for fp8."""
    width = layout.DS_MLA_ROW_BYTES if kv_cache_dtype == "fp8_ds_mla" else layout.D_QK
    storage = torch.uint8 if kv_cache_dtype.startswith("fp8") else torch.bfloat16
    cache = torch.full((PAGES, PAGE, width), 0xFF if storage == torch.uint8 else math.nan, dtype=storage)
    for request, length in enumerate(common.seq_lens.tolist()):
        rows = torch.cat([torch.randn(length, 512) / 4, torch.randn(length, 64)], -1)
        position = torch.arange(length)
        slots = common.block_table_tensor[request, position // PAGE].long() * PAGE + position % PAGE
        layout.write_cache(rows, slots, cache, k_scale)
    return cache


def expected(
    q: torch.Tensor, cache: torch.Tensor, meta: Any, k_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64, one row at a time, on what the cache holds."""
    decode = meta.decode
    b = decode.seq_lens.shape[0]
    s_q = q.shape[0] // b
    out = torch.zeros(*q.shape[:2], 512, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    rows = layout.read_cache(cache, k_scale.double(), torch.float64)
    for request, length in enumerate(decode.seq_lens.tolist()):
        keys = rows[decode.block_table[request].long()].flatten(0, 1)
        for row in range(s_q):
            visible = keys[: max(length - s_q + 1 + row, 0)]
            if len(visible):
                scores = q[request * s_q + row].double() @ visible.T * SCALE
                lse[request * s_q + row] = torch.logsumexp(scores, -1)
                out[request * s_q + row] = torch.softmax(scores, -1) @ visible[:, :512]
    return out, lse


def as_layer_query(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts as vLLM's layer passes them: a transposed product and a slice of a wider tensor."""
    latent = q[..., :512].transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat([torch.zeros(*q.shape[:2], 64, dtype=q.dtype), q[..., 512:]], -1)
    assert not latent.is_contiguous() or q.shape[0] == 1
    return latent, wide[..., 64:]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[workspace.WorkspaceManager]:
    """The backend believes to be on a GPU; its tensors stay on the CPU and its kernels run in the interpreter."""
    pytest.importorskip("triton")
    stand_in = SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: True,
        device_type="cpu",
        get_device_capability=lambda: DeviceCapability(9, 0),
    )
    for module in (backend, cache_update, metadata):
        monkeypatch.setattr(module, "current_platform", stand_in)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    workspace.init_workspace_manager(torch.device("cpu"))
    yield workspace.current_workspace_manager()
    workspace.reset_workspace_manager()


@pytest.fixture(params=["reference", "kernel"])
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "kernel":
        request.getfixturevalue("as_on_a_gpu")
    return request.param


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_ds_mla"])
@pytest.mark.parametrize("as_tuple", [True, False], ids=["tuple", "concatenated"])
@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [([1, 1, 1], [1, 37, 48]), ([2, 2, 0], [33, 2, 0])],
    ids=["one token", "two tokens and padding"],
)
def test_decode_equals_float64(
    vllm_config: Any, path: str, kv_cache_dtype: str, as_tuple: bool, query_lens: list[int], seq_lens: list[int]
) -> None:
    impl, builder = make_impl(kv_cache_dtype), make_builder(vllm_config, kv_cache_dtype)
    if path == "kernel":
        workspace.lock_workspace()  # as after warm-up: from here on it must not grow
    k_scale = torch.tensor(0.0137 if kv_cache_dtype == "fp8" else 1.0)
    padded_tokens = max(query_lens) * len(query_lens)
    common = step(query_lens, seq_lens, padded_tokens)
    meta = builder.build(0, common)
    assert (meta.num_decodes, meta.num_decode_tokens, meta.num_prefills) == (len(seq_lens), padded_tokens, 0)
    assert (meta.decode.plan is None) == (path == "reference")
    raw = filled_cache(common, kv_cache_dtype, k_scale)
    cache = raw.view(torch.float8_e4m3fn) if kv_cache_dtype == "fp8" else raw  # what MLAAttention hands over
    q = (torch.randn(padded_tokens, HEADS, 576) * 0.3).bfloat16()
    before = metadata.decode_tokens.tokens
    assert metadata.decode_tokens.scheduled >= padded_tokens
    out, lse = impl.forward_mqa(as_layer_query(q) if as_tuple else q, cache, meta, SimpleNamespace(_k_scale=k_scale))
    assert metadata.decode_tokens.tokens == before + padded_tokens
    assert out.shape == (padded_tokens, HEADS, 512) and out.dtype == q.dtype and out.is_contiguous()
    assert lse is not None and lse.shape == (padded_tokens, HEADS) and lse.dtype == torch.float32
    want, want_lse = expected(q, raw, meta, k_scale)
    assert torch.equal(lse.isfinite(), want_lse.isfinite())
    torch.testing.assert_close(lse.double(), want_lse, rtol=8.01 / 65536, atol=2e-6)
    # With this few keys a softmax weight is near 1, and its rounding to bf16 costs up to 2^-9 of a value.
    torch.testing.assert_close(out.double(), want, rtol=2.01 / 128, atol=2**-9)
    got, right = out.double().flatten(), want.flatten()
    # Triton's interpreter truncates to bf16, weights as well as results, each by up to 2^-7 of itself.
    limit = 5e-6 if path == "reference" else 2e-5
    assert 1 - 2 * (got @ right) / (got @ got + right @ right) < limit


def test_schedule_buffers_stay_in_place(vllm_config: Any, as_on_a_gpu: Any) -> None:
    """Graphs captured with one step's schedule find the next step's at the same addresses."""
    builder = make_builder(vllm_config)
    first = builder.build(0, step([1] * 8, [40] * 8)).decode
    kept = [getattr(first.schedule, field.name).clone() for field in dataclasses.fields(first.schedule)]
    second = builder.build(0, step([1, 1, 1], [7, 48, 1])).decode
    assert first.plan == second.plan
    for field, old in zip(dataclasses.fields(first.schedule), kept, strict=True):
        assert getattr(first.schedule, field.name).data_ptr() == getattr(second.schedule, field.name).data_ptr()
        if field.name == "num_splits":
            assert old.numel() == 9 and getattr(second.schedule, field.name).numel() == 4
    # A drafter advances the lengths on the device and asks for the schedule in place.
    rebuilt = builder.build(0, step([1, 1, 1], [16, 17, 48])).decode.schedule.items.clone()
    meta = builder.build(0, step([1, 1, 1], [1, 1, 1]))
    meta.decode.seq_lens.copy_(torch.tensor([16, 17, 48], dtype=torch.int32))
    builder.update_draft_decode_metadata(meta)
    assert torch.equal(meta.decode.schedule.items[:3], rebuilt[:3])


def test_kernels_that_schedule_themselves_get_no_schedule(
    vllm_config: Any, as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = select.select_decode((9, 0), HEADS, "bf16", hopper=True)
    monkeypatch.setattr(
        limits.DecodeLimits, "plan", lambda self, s_q, device, tiles=None: make_plan(config, HEADS * s_q, 132, False)
    )
    monkeypatch.setattr(limits.DecodeLimits, "warm_up", lambda *call: None)
    monkeypatch.setattr(metadata, "build_schedule", lambda *call: pytest.fail("a launch for nothing"))
    builder = make_builder(vllm_config)
    meta = builder.build(0, step([1] * 4, [40, 1, 7, 30]))
    assert meta.decode.plan.on_hopper and meta.decode.schedule is None
    builder.update_draft_decode_metadata(meta)


def test_environment_reaches_the_plan(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(limits, "decode_plan", lambda *call, tiles: asked.append(call[-2:]))
    for kernel, fp8_mma in (("auto", "0"), ("portable", "0"), ("auto", "1")):
        monkeypatch.setenv("VLLM_FUSEDMLA_KERNEL", kernel)
        monkeypatch.setenv("VLLM_FUSEDMLA_FP8_MMA", fp8_mma)
        limits.DecodeLimits.of(vllm_config, HEADS, "fp8", MAX_S_Q).plan(1, torch.device("cpu"))
    assert asked == [(False, False), (False, True), (True, False)]  # fp8_mma, portable


@pytest.mark.parametrize("reserve", ["impl", "builder"])
def test_scratch_memory_is_reserved_for_the_largest_step(vllm_config: Any, as_on_a_gpu: Any, reserve: str) -> None:
    """By the layer before memory profiling, and again by the builder, whose threshold vLLM may have raised."""
    if reserve == "impl":
        make_impl().reserve_workspace()
    else:
        make_builder(vllm_config)
    workspace.lock_workspace()
    largest = limits.DecodeLimits.of(vllm_config, HEADS, "auto", MAX_S_Q)
    for b, s_q in ((8, 1), (8, 8), (1, 8)):
        shapes = largest.plan(s_q, torch.device("cpu")).workspace_shapes(b, s_q, HEADS)
        tensors = compat.shared_workspace([(shape, torch.float32) for shape in shapes])
        assert tensors is not None and [tuple(tensor.shape) for tensor in tensors] == list(shapes)


def test_gpu_layer_names_kernel_and_reason(vllm_config: Any, as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(backend.logger, "info_once", lambda message, *values: lines.append(message % values))
    for missing in (None, "not compiled: a, b"):
        monkeypatch.setattr(hopper, "unavailable", lambda missing=missing: missing)
        make_impl("fp8")
    for choice in ("portable", "reference"):
        monkeypatch.setenv("VLLM_FUSEDMLA_KERNEL", choice)
        make_impl()
    reason = "compute capability 9.0, 4 query rows a request, fp8 cache"
    expected = (
        ("swapab", reason),
        ("triton", f"{reason}; not compiled: a, b"),
        ("triton", "VLLM_FUSEDMLA_KERNEL=portable"),
        ("reference", "VLLM_FUSEDMLA_KERNEL=reference"),
    )
    assert lines == [f"FUSEDMLA: dense MLA decode by the kernel '{name}' ({why})." for name, why in expected]


def test_gpu_cache_update_is_vllms(vllm_config: Any, as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(MLAAttentionImpl, "do_kv_cache_update", lambda self, *values: passed.append(values))
    make_impl().do_kv_cache_update(1, 2, 3, 4, "auto", 5, True)  # type: ignore[arg-type]
    assert passed == [(1, 2, 3, 4, "auto", 5, True)]


@pytest.mark.parametrize(
    ("kv_cache_dtype", "width", "dtype"),
    [("auto", 576, torch.bfloat16), ("fp8", 576, torch.float8_e4m3fn), ("fp8_ds_mla", 656, torch.uint8)],
)
def test_kernels_are_compiled_before_the_first_request(
    vllm_config: Any,
    as_on_a_gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    kv_cache_dtype: str,
    width: int,
    dtype: torch.dtype,
) -> None:
    """For every number of new tokens that can be decoded, with the cache's real page size and dtype."""
    from vllm_fusedmla.kernels import dense_decode

    launched: set[tuple[int, ...]] = set()
    decode = dense_decode.mla_decode

    def watch(q: torch.Tensor, cache: torch.Tensor, *args: Any, **options: Any) -> Any:
        launched.add((*q.shape[1:3], *cache.shape[1:]))
        assert cache.dtype == dtype and q.dtype == torch.bfloat16
        return decode(q, cache, *args, **options)

    monkeypatch.setattr(dense_decode, "mla_decode", watch)
    make_builder(vllm_config, kv_cache_dtype)
    assert launched == {(s_q, HEADS, PAGE, width) for s_q in range(1, MAX_S_Q + 1)}


def test_graph_support(vllm_config: Any, as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    support = metadata.FusedMLAMetadataBuilder.get_cudagraph_support
    assert support(vllm_config, None) == AttentionCGSupport.UNIFORM_BATCH
    monkeypatch.setenv("VLLM_FUSEDMLA_KERNEL", "reference")
    assert support(vllm_config, None) == AttentionCGSupport.NEVER  # it synchronises


def test_prefills_and_decodes_are_split_by_the_threshold(vllm_config: Any) -> None:
    builder = make_builder(vllm_config)
    assert builder.reorder_batch_threshold == envs.VLLM_FUSEDMLA_DECODE_THRESHOLD
    short = builder.build(0, step([8, 8], [8, 40]))
    assert (short.num_decodes, short.num_prefills, short.decode.seq_lens.tolist()) == (2, 0, [8, 40])
    # Where lengths differ, the requests of the first one's length are decoded.
    mixed = builder.build(0, step([1, 1, 3], [9, 40, 3]))
    assert (mixed.num_decodes, mixed.num_decode_tokens, mixed.num_prefills) == (2, 2, 1)


def test_threshold_is_one_in_batch_invariant_mode(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "batch_invariant", lambda: True)
    assert make_builder(vllm_config).reorder_batch_threshold == 1


def test_batch_invariant_scratch_memory_is_bounded() -> None:
    pytest.importorskip("triton")
    large = limits.DecodeLimits(1024, 2, 4096, 128, torch.bfloat16, "bf16", batch_invariant=True)
    out, lse = large.plan(2, torch.device("cpu")).workspace_shapes(1024, 2, 128)
    assert 4 * (math.prod(out) + math.prod(lse)) <= 1 << 30
    small = limits.DecodeLimits(16, 1, 4096, 16, torch.bfloat16, "bf16", True).plan(1, torch.device("cpu"))
    assert small.params.max_splits > 1 and small.params.batch_invariant


def test_every_kernel_of_a_step_is_known_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "device_facts", lambda device: ((9, 0), 132))
    monkeypatch.setattr(hopper, "available", lambda: True)
    monkeypatch.setattr(hopper, "loads", lambda *call: True)
    gpu = torch.device("cuda", 0)
    largest = limits.DecodeLimits(64, 2, 9000, 128, torch.bfloat16, "bf16", False)
    known = largest.plans(1, gpu)
    assert {made.config.kernel for made in known} == {"swapab", "twowg"}
    assert {largest.plan(1, gpu, tiles) for tiles in range(9000)} == known
    same = limits.DecodeLimits(64, 2, 9000, 128, torch.bfloat16, "bf16", True)
    assert len(same.plans(1, gpu)) == 1 and same.plan(1, gpu, 1) in same.plans(1, gpu)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_ds_mla"])
def test_cache_update_skips_padding_slots(vllm_config: Any, kv_cache_dtype: str) -> None:
    impl = make_impl(kv_cache_dtype)
    dtype = torch.uint8 if kv_cache_dtype.startswith("fp8") else torch.bfloat16
    cache = torch.zeros(2, PAGE, 656 if kv_cache_dtype == "fp8_ds_mla" else 576, dtype=dtype)
    kv_c, k_pe = torch.randn(4, 512).bfloat16(), torch.randn(4, 1, 64).bfloat16()
    k_scale = torch.tensor(0.5 if kv_cache_dtype == "fp8" else 1.0)
    slots = torch.tensor([3, -1, 20])  # the fourth row is padding of the batch
    impl.do_kv_cache_update(kv_c, k_pe, cache, slots, kv_cache_dtype, k_scale, False)  # 0.33 passes skip_scale
    rows = torch.cat([kv_c, k_pe.squeeze(1)], -1)[[0, 2]].float()
    stored = layout.read_cache(cache, k_scale).flatten(0, 1)
    torch.testing.assert_close(stored[[3, 20]], rows, rtol=0 if kv_cache_dtype == "auto" else 1 / 16, atol=1e-3)
    others = torch.ones(2 * PAGE, dtype=torch.bool)
    others[[3, 20]] = False
    assert (stored[others] == 0).all()
    empty = torch.empty(0, dtype=dtype)
    impl.do_kv_cache_update(kv_c, k_pe, empty, slots, kv_cache_dtype, k_scale)  # the profiling run has no cache


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 128}, "a sliding window"),
        ({"logits_soft_cap": 30.0}, "a logits soft cap"),
        ({"kv_lora_rank": 448}, "kv_lora_rank 448"),
        ({"num_heads": 160}, "160 query heads"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
    ],
)
def test_impl_refuses_with_a_reason(vllm_config: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        make_impl(**changes)


@pytest.mark.parametrize(("asked", "page"), [({}, 16), ({"block_size": 64}, 64)], ids=["default", "64"])
def test_cpu_platform_is_configured_for_fusedmla(model_folder: Path, asked: dict[str, Any], page: int) -> None:
    config = vllm_layers.engine_config(model_folder, **asked)
    assert config.attention_config.backend.name == "FUSEDMLA"
    assert config.cache_config.block_size == page
    assert not config.cache_config.enable_prefix_caching  # as for the platform's own reference backend
    assert "-rotary_embedding" in config.compilation_config.custom_ops


def test_cpu_platform_is_untouched_for_other_backends(model_folder: Path) -> None:
    config = vllm_layers.engine_config(model_folder, attention_backend="CPU_MLA")
    assert config.attention_config.backend.name == "CPU_MLA"
    assert "-rotary_embedding" not in config.compilation_config.custom_ops


def test_user_may_keep_the_rotary_op(model_folder: Path) -> None:
    config = vllm_layers.engine_config(model_folder, compilation_config={"custom_ops": ["+rotary_embedding"]})
    assert "-rotary_embedding" not in config.compilation_config.custom_ops
