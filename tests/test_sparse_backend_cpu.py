# SPDX-License-Identifier: Apache-2.0
"""The sparse classes inside vLLM's own builder and layer interfaces, without a model: metadata, attention, refusals.

Two paths: the CPU platform's (PyTorch reference) and the GPU's, whose kernels run here in Triton's interpreter.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
import vllm_layers  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.attention import sparse_mla_attention  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata  # noqa: E402
from vllm.v1.worker import workspace  # noqa: E402

from evals.models.sparse_probe import ProbeConfig, hf_config  # noqa: E402
from vllm_fusedmla import backend, cache_update, compat, limits, metadata, sparse_backend, sparse_metadata  # noqa: E402
from vllm_fusedmla.kernels import layout, reference  # noqa: E402

if not current_platform.is_cpu():
    pytest.skip("needs vLLM's CPU build", allow_module_level=True)

HEADS, PAGE, PAGES, TOPK, SCALE = 4, 64, 13, 64, 0.15
Q_LORA_RANK = 96


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    config = ProbeConfig(num_hidden_layers=1, num_attention_heads=HEADS, index_topk=TOPK)
    (folder / "config.json").write_text(json.dumps(hf_config(config, torch.bfloat16)))
    return folder


@pytest.fixture
def vllm_config(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(sparse_mla_attention, "get_tensor_model_parallel_world_size", lambda: 1)
    config = vllm_layers.engine_config(model_folder)
    with set_current_vllm_config(config):
        yield config


def make_impl(kv_cache_dtype: str = "auto", **changes: Any) -> sparse_backend.FusedMLASparseImpl:
    arguments = vllm_layers.impl_arguments(HEADS, SCALE, kv_cache_dtype, Q_LORA_RANK)
    arguments["topk_indices_buffer"] = torch.full((600, TOPK), -1, dtype=torch.int32)
    return sparse_backend.FusedMLASparseImpl(**{**arguments, **changes})


def make_builder(config: Any, kv_cache_dtype: str = "auto") -> sparse_metadata.FusedMLASparseMetadataBuilder:
    builder = sparse_metadata.FusedMLASparseMetadataBuilder
    return vllm_layers.make_builder(builder, config, HEADS, PAGE, kv_cache_dtype, Q_LORA_RANK)


def step(query_lens: list[int], seq_lens: list[int], num_tokens: int | None = None) -> CommonAttentionMetadata:
    return vllm_layers.step(query_lens, seq_lens, PAGES, num_tokens)


class Case:
    """A step whose tokens attend to random keys, and what that gives in float64 on what the cache holds."""

    def __init__(self, query_lens: list[int], seq_lens: list[int], kv_cache_dtype: str, tokens: int) -> None:
        self.common = step(query_lens, seq_lens, tokens)
        width = layout.DS_MLA_ROW_BYTES if kv_cache_dtype == "fp8_ds_mla" else layout.D_QK
        storage = torch.uint8 if kv_cache_dtype == "fp8_ds_mla" else torch.bfloat16
        # NaN, or 0xFF which is NaN too: a row that no list names must not matter.
        self.cache = torch.full((PAGES, PAGE, width), 0xFF if storage == torch.uint8 else math.nan, dtype=storage)
        self.indices = torch.full((tokens, TOPK), -1, dtype=torch.int32)
        self.q = (torch.randn(tokens, HEADS, 576) * 0.3).bfloat16()
        self.rows: list[torch.Tensor | None] = [None] * tokens
        table = self.common.block_table_tensor
        starts = self.common.query_start_loc.tolist()
        for request, length in enumerate(seq_lens):
            named: set[int] = set()
            for token in range(starts[request], starts[request + 1]):
                visible = length - (starts[request + 1] - token) + 1
                chosen = random.sample(range(visible), min(visible, random.randrange(1, TOPK)))
                places = random.sample(range(TOPK), len(chosen))  # unsorted, with holes
                self.indices[token, places] = torch.tensor(chosen, dtype=torch.int32)
                named |= set(chosen)
            position = torch.tensor(sorted(named), dtype=torch.int64)
            slots = table[request, position // PAGE].long() * PAGE + position % PAGE
            kv = torch.cat([torch.randn(len(position), 512) / 4, torch.randn(len(position), 64)], -1)
            layout.write_cache(kv, slots, self.cache)
            for token in range(starts[request], starts[request + 1]):
                at = self.indices[token][self.indices[token] >= 0].long()
                self.rows[token] = self.read(table[request, at // PAGE].long(), at % PAGE)

    def read(self, page: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        rows = self.cache[page, offset]
        return layout.unpack_rows(rows, layout.cache_format(self.cache), 1.0, torch.float64)

    def expected(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.zeros(tokens, HEADS, 512, dtype=torch.float64)
        lse = torch.full((tokens, HEADS), -math.inf, dtype=torch.float64)
        for token in range(tokens):
            keys = self.rows[token]
            if keys is not None and len(keys):
                scores = self.q[token].double() @ keys.T * SCALE
                lse[token] = torch.logsumexp(scores, -1)
                out[token] = torch.softmax(scores, -1) @ keys[:, :512]
        return out, lse


def as_layer_query(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts as vLLM's layer passes them: a product and a slice of a wider tensor."""
    wide = torch.cat([torch.zeros(*q.shape[:2], 64, dtype=q.dtype), q[..., 512:]], -1)
    return q[..., :512].contiguous(), wide[..., 64:]


def assert_close(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor], path: str) -> None:
    out, lse = got[0].double(), got[1].double()
    assert torch.equal(lse.isfinite(), want[1].isfinite())
    torch.testing.assert_close(lse, want[1], rtol=8.01 / 65536, atol=2e-6)
    # With this few keys a softmax weight is near 1, and its rounding to bf16 costs up to 2^-9 of a value.
    torch.testing.assert_close(out, want[0], rtol=2.01 / 128, atol=2**-9)
    a, b = out.flatten(), want[0].flatten()
    difference = float(1 - 2 * (a @ b) / (a @ a + b @ b))
    # The interpreter's cast to bfloat16 truncates, which makes results smaller by up to 2^-8: no such step on a GPU.
    assert difference < {"reference": 5e-6, "kernel": 3e-5}[path], difference


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
    for module in (backend, cache_update, metadata, sparse_backend):
        monkeypatch.setattr(module, "current_platform", stand_in)
    monkeypatch.setattr(limits, "_WARM_UP_REQUESTS", 2)  # the interpreter is slow
    monkeypatch.setattr(limits, "FEW_TOKENS", 1)
    monkeypatch.setenv("VLLM_FUSEDMLA_INDEXER", "0")  # nor is its warm-up needed here
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    workspace.init_workspace_manager(torch.device("cpu"))
    yield workspace.current_workspace_manager()
    workspace.reset_workspace_manager()


@pytest.fixture(params=["reference", "kernel"])
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "kernel":
        request.getfixturevalue("as_on_a_gpu")
    return request.param


# query lengths, sequence lengths, tokens with padding, tokens to attend for, launches: (first, last, s_q, by slots)
STEPS = {
    "decodes": ([1, 1, 1], [1, 70, 190], 3, 3, [(0, 3, 1, False)]),
    "padding of a graph": ([1, 1, 0, 0], [70, 64, 0, 0], 4, 4, [(0, 4, 1, False)]),
    "speculation and padding": ([2, 2, 0], [65, 2, 0], 6, 6, [(0, 6, 2, False)]),
    "padding without tokens for it": ([2, 2, 0, 0], [65, 130, 0, 0], 4, 4, [(0, 4, 2, False)]),
    "a length without a kernel": ([3, 3], [65, 130], 6, 6, [(0, 6, 1, True)]),
    "different lengths": ([1, 3], [65, 130], 4, 4, [(0, 1, 1, False), (1, 4, 1, False)]),
    "one prompt": ([9], [70], 9, 9, [(0, 9, 1, False)]),
    "decodes and a prompt": ([1, 1, 9], [65, 3, 70], 11, 11, [(0, 2, 1, False), (2, 11, 1, False)]),
    "decodes and prompts": ([1, 9, 10], [65, 70, 12], 20, 20, [(0, 1, 1, False), (1, 20, 1, True)]),
    "prompts go to dense prefill": ([1, 1, 9], [65, 3, 9], 11, 2, [(0, 2, 1, False)]),
}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_ds_mla"])
@pytest.mark.parametrize("name", STEPS)
def test_equals_float64(
    vllm_config: Any, path: str, kv_cache_dtype: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query_lens, seq_lens, tokens, attended, launches = STEPS[name]
    monkeypatch.setattr(compat, "max_decode_query_len", lambda config: 2)
    impl, builder = make_impl(kv_cache_dtype), make_builder(vllm_config, kv_cache_dtype)
    if path == "kernel":
        workspace.lock_workspace()  # as after warm-up: from here on it must not grow
    case = Case(query_lens, seq_lens, kv_cache_dtype, tokens)
    meta = builder.build(0, case.common)
    groups = sparse_metadata.token_groups(meta, attended, lambda tokens, keys: False)
    assert [(g.tokens.start, g.tokens.stop, g.s_q, g.block_table is None) for g in groups] == launches
    assert impl.topk_indices_buffer is not None
    impl.topk_indices_buffer[:tokens] = case.indices
    q = case.q[:attended]
    before = sparse_metadata.sparse_tokens.tokens
    for query in (as_layer_query(q), q):
        out, lse = impl.forward_mqa(query, case.cache, meta, SimpleNamespace())
        assert out.shape == (attended, HEADS, 512) and out.dtype == q.dtype and out.is_contiguous()
        assert lse is not None and lse.shape == (attended, HEADS) and lse.dtype == torch.float32
        assert_close((out, lse), case.expected(attended), path)
    assert sparse_metadata.sparse_tokens.tokens == before + 2 * attended


# a step: fewest tokens of prompts whose keys are converted, keys that are, launches
CONVERTED = {
    "one prompt": (9, [70], [(0, 9, False)]),
    "decodes and a prompt": (9, [70], [(0, 2, False), (2, 11, False)]),
    "decodes and prompts": (9, [70, 12], [(0, 1, False), (1, 10, False), (10, 20, False)]),
    "prompts, the last one long": (10, [12], [(0, 1, False), (1, 10, True), (10, 20, False)]),
    "prompts, the first one long": (12, [130], [(0, 12, False), (12, 20, True)]),
    "short prompts": (99, [], [(0, 1, False), (1, 20, True)]),
}
CONVERTED_STEPS = {
    "prompts, the last one long": ([1, 9, 10], [65, 70, 12]),
    "prompts, the first one long": ([12, 5, 3], [130, 70, 12]),
    "short prompts": ([1, 9, 10], [65, 70, 12]),
} | {name: step[:2] for name, step in STEPS.items()}


@pytest.mark.parametrize("name", CONVERTED)
def test_prompts_by_way_of_converted_rows(
    vllm_config: Any, as_on_a_gpu: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Hopper does for many heads: long prompts read bfloat16 rows, in memory reserved beforehand."""
    from vllm_fusedmla.kernels import sparse_convert, sparse_plan

    least, converted_keys, launches = CONVERTED[name]
    query_lens, seq_lens = CONVERTED_STEPS[name]
    convert, converted = sparse_convert.rows_to_bfloat16, []

    def count(cache: torch.Tensor, pages: torch.Tensor, rows: int, *rest: Any) -> torch.Tensor:
        converted.append(rows)
        return convert(cache, pages, rows, *rest)

    monkeypatch.setattr(sparse_plan.SparsePlan, "converts", lambda plan, name, tokens, rows: tokens >= least)
    impl, builder = make_impl("fp8_ds_mla"), make_builder(vllm_config, "fp8_ds_mla")
    workspace.lock_workspace()
    monkeypatch.setattr(sparse_convert, "rows_to_bfloat16", count)
    case = Case(query_lens, seq_lens, "fp8_ds_mla", tokens := sum(query_lens))
    meta = builder.build(0, case.common)
    groups = sparse_metadata.token_groups(meta, tokens, impl._converts)
    assert [(g.tokens.start, g.tokens.stop, g.block_table is None) for g in groups] == launches
    assert impl.topk_indices_buffer is not None
    impl.topk_indices_buffer[:tokens] = case.indices
    out, lse = impl.forward_mqa(case.q, case.cache, meta, SimpleNamespace())
    assert lse is not None
    assert_close((out, lse), case.expected(tokens), "kernel")
    assert converted == converted_keys


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_ds_mla"])
def test_all_keys_selected_is_dense(vllm_config: Any, path: str, kv_cache_dtype: str) -> None:
    """A list of all visible keys gives what the dense reference gives."""
    impl, builder = make_impl(kv_cache_dtype), make_builder(vllm_config, kv_cache_dtype)
    lengths = [random.randrange(1, TOPK + 1) for _ in range(3)]
    case = Case([1] * 3, lengths, kv_cache_dtype, 3)
    meta = builder.build(0, case.common)
    assert impl.topk_indices_buffer is not None
    for token, length in enumerate(lengths):
        position = torch.arange(length)
        slots = case.common.block_table_tensor[token, position // PAGE].long() * PAGE + position % PAGE
        layout.write_cache(torch.cat([torch.randn(length, 512) / 4, torch.randn(length, 64)], -1), slots, case.cache)
        impl.topk_indices_buffer[token] = -1
        impl.topk_indices_buffer[token, random.sample(range(TOPK), length)] = torch.randperm(length).int()
    out, lse = impl.forward_mqa(case.q, case.cache, meta, SimpleNamespace())
    assert lse is not None
    arguments = case.q.unsqueeze(1), case.cache, meta.block_table, case.common.seq_lens
    want = reference.mla_decode(*arguments, sm_scale=SCALE, compute_dtype=torch.float64)
    assert_close((out, lse), (want[0].squeeze(1).double(), want[1].squeeze(1)), path)


@pytest.mark.parametrize("interleave", [1, 16])
def test_ranks_of_context_parallelism_add_up(vllm_config: Any, path: str, interleave: int) -> None:
    """Each rank attends to the keys it holds; merged by the log-sum-exps, that is the whole."""
    case = Case([1, 1, 9], [180, 3, 190], "auto", 11)
    want = case.expected(11)
    outs, lses = [], []
    for rank in range(2):
        impl, builder = make_impl(), make_builder(vllm_config)
        impl.dcp_world_size, impl.dcp_rank, impl._interleave = 2, rank, interleave
        impl._limits = limits.SparseLimits.of(vllm_config, HEADS, "auto")
        cache = torch.full_like(case.cache, math.nan)
        for request, length in enumerate(case.common.seq_lens.tolist()):
            position = torch.arange(length)
            mine = position[position // interleave % 2 == rank]
            local = mine // (2 * interleave) * interleave + mine % interleave  # runs of keys, one after the other
            table = case.common.block_table_tensor[request].long()
            cache[table[local // PAGE], local % PAGE] = case.cache[table[mine // PAGE], mine % PAGE]
        assert impl.topk_indices_buffer is not None
        impl.topk_indices_buffer[:11] = case.indices
        out, lse = impl.forward_mqa(case.q, cache, builder.build(0, case.common), SimpleNamespace())
        assert lse is not None
        outs.append(out.double())
        lses.append(lse.double())
    total = torch.logsumexp(torch.stack(lses), 0)
    merged = sum(out * (lse - total).exp().unsqueeze(-1) for out, lse in zip(outs, lses, strict=True))
    torch.testing.assert_close(total, want[1], rtol=8.01 / 65536, atol=4e-6)
    torch.testing.assert_close(merged, want[0], rtol=2.01 / 128, atol=2**-8)  # two roundings to bf16


def test_positions_of_a_rank() -> None:
    world, interleave, length = random.randrange(2, 5), random.choice([1, 4, 16]), 200
    owned: list[list[int]] = [[] for _ in range(world)]
    for position in range(length):
        owned[position // interleave % world].append(position)
    indices = torch.cat([torch.randperm(length), torch.full((7,), -1)]).int().unsqueeze(0)
    for rank in range(world):
        expected = [owned[rank].index(p) if p in owned[rank] else -1 for p in indices[0].tolist()]
        assert sparse_metadata.local_positions(indices, world, rank, interleave)[0].tolist() == expected


def test_slots_of_positions() -> None:
    table = torch.tensor([[3, 1, 7], [0, 2, 5]], dtype=torch.int32)
    indices = torch.tensor([[0, 63, -1, 64, 191], [130, -7, 192, 1 << 30, 65]], dtype=torch.int32)
    slots = sparse_metadata.cache_slots(indices, torch.tensor([1, 0], dtype=torch.int32), table, 64)
    assert slots.tolist() == [[0, 63, -1, 2 * 64, 5 * 64 + 63], [7 * 64 + 2, -1, -1, -1, 1 * 64 + 1]]
    assert slots.dtype == torch.int32


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    [
        ([1, 1, 1], 3, 1),
        ([2, 2, 0], 6, 2),
        ([2, 2, 0, 0], 4, 2),
        ([2, 0, 2], 4, 0),
        ([2, 1], 3, 0),
        ([1, 1], 3, 0),
        ([0, 0], 2, 0),
        ([], 0, 0),
    ],
)
def test_uniform_query_len(lengths: list[int], tokens: int, expected: int) -> None:
    starts = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int32).cumsum(0).tolist()], dtype=torch.int32)
    assert sparse_metadata.uniform_query_len(starts, len(lengths), tokens) == expected


def test_a_drafters_steps(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block tables follow by themselves; slots need to know whose each token is."""
    refreshed: list[int] = []
    monkeypatch.setattr(compat, "refresh_request_of_token", lambda meta: refreshed.append(meta.num_decode_tokens))
    builder = make_builder(vllm_config)
    assert builder.supports_draft_decode_metadata_update
    builder.update_draft_decode_metadata(builder.build(0, step([1, 1, 1], [9, 70, 8])))
    assert refreshed == []
    builder.update_draft_decode_metadata(builder.build(0, step([3, 3], [9, 70])))
    assert refreshed == [6]


def test_batch_invariant_tokens_do_not_depend_on_the_step(
    vllm_config: Any, as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits for a decoded token alone, among others, and beside a prompt."""
    monkeypatch.setattr(compat, "batch_invariant", lambda: True)
    impl, builder = make_impl(), make_builder(vllm_config)
    assert not impl.supports_dense_mha_prefill
    case = Case([1, 1, 1, 5], [190, 70, 188, 80], "auto", 8)
    assert impl.topk_indices_buffer is not None
    impl.topk_indices_buffer[:8] = case.indices
    together = impl.forward_mqa(case.q, case.cache, builder.build(0, case.common), SimpleNamespace())
    alone = step([1], [190])
    alone.block_table_tensor = case.common.block_table_tensor[:1]
    got = impl.forward_mqa(case.q[:1], case.cache, builder.build(0, alone), SimpleNamespace())
    assert got[1] is not None and together[1] is not None
    assert torch.equal(got[0], together[0][:1]) and torch.equal(got[1], together[1][:1])


def test_scratch_memory_is_reserved_and_bounded(
    vllm_config: Any, as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for invariant in (False, True):
        monkeypatch.setattr(compat, "batch_invariant", lambda invariant=invariant: invariant)
        make_impl().reserve_workspace()
        largest = limits.SparseLimits.of(vllm_config, HEADS, "auto")
        workspace.lock_workspace()
        for tokens in (1, 3, largest.decode_tokens):
            shapes = largest.workspace_shapes(largest.plan(torch.device("cpu")), tokens)
            tensors = compat.shared_workspace([(shape, torch.float32) for shape in shapes])
            assert tensors is not None and [tuple(tensor.shape) for tensor in tensors] == list(shapes)
        workspace.unlock_workspace()
    many = limits.SparseLimits(8192, 8192, (1,), 128, 2048, 4096, torch.bfloat16, "bf16", True)
    out, *_ = many.plan(torch.device("cpu")).workspace_shapes(8192, 1, 128)
    assert 4 * math.prod(out) <= 1 << 31  # one partial result a token, no more


def test_graph_support(vllm_config: Any, as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    support = sparse_metadata.FusedMLASparseMetadataBuilder.get_cudagraph_support
    assert support(vllm_config, None) == AttentionCGSupport.UNIFORM_BATCH
    monkeypatch.setenv("VLLM_FUSEDMLA_KERNEL", "reference")
    assert support(vllm_config, None) == AttentionCGSupport.NEVER  # it synchronises


def test_layer_names_kernel_and_reason(vllm_config: Any, as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(sparse_backend.logger, "info_once", lambda message, *values: lines.append(message % values))
    impl = make_impl("fp8_ds_mla")
    config = impl._limits.plan(torch.device("cpu")).config
    assert impl.index_group is None  # vLLM's buffers for converted indices are not made
    assert lines == [
        f"FUSEDMLA: sparse MLA over the indexer's top {TOPK} by the kernel '{config.kernel}' ({config.reason})."
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 128}, "a sliding window"),
        ({"logits_soft_cap": 30.0}, "a logits soft cap"),
        ({"num_heads": 160}, "160 query heads"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"kv_cache_dtype": "fp8"}, r"a fp8 KV cache \(fp8_ds_mla only\)"),
        ({"topk_indices_buffer": None}, "a layer without the indexer's buffer"),
    ],
)
def test_impl_refuses_with_a_reason(vllm_config: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=f"FUSEDMLA does not support .*{words}"):
        make_impl(**changes)


def test_cache_update_skips_padding_slots(vllm_config: Any) -> None:
    impl = make_impl("fp8_ds_mla")
    cache = torch.zeros(2, PAGE, 656, dtype=torch.uint8)
    kv_c, k_pe = torch.randn(4, 512).bfloat16(), torch.randn(4, 1, 64).bfloat16()
    slots = torch.tensor([3, -1, 70])  # the fourth row is padding of the batch
    impl.do_kv_cache_update(kv_c, k_pe, cache, slots, "fp8_ds_mla", torch.ones(()), False)  # 0.33 passes skip_scale
    stored = layout.read_cache(cache).flatten(0, 1)
    rows = torch.cat([kv_c, k_pe.squeeze(1)], -1)[[0, 2]].float()
    torch.testing.assert_close(stored[[3, 70]], rows, rtol=1 / 16, atol=1e-3)
    others = torch.ones(2 * PAGE, dtype=torch.bool)
    others[[3, 70]] = False
    assert (stored[others] == 0).all()
    impl.do_kv_cache_update(kv_c, k_pe, torch.empty(0, dtype=torch.uint8), slots, "fp8_ds_mla", torch.ones(()))
