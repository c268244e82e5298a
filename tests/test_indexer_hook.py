# SPDX-License-Identifier: Apache-2.0
"""The indexer inside vLLM: on CPUs, and this project's kernels (in Triton's interpreter) in vLLM's own GPU indexer."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")
from vllm import _custom_ops  # noqa: E402
from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.model_executor.layers import sparse_attn_indexer as layer  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backends.mla import indexer as builder  # noqa: E402
from vllm.v1.worker import workspace  # noqa: E402

from vllm_fusedmla import compat, indexer, indexer_cpu, plugin  # noqa: E402
from vllm_fusedmla.kernels import indexer_reference  # noqa: E402

if not current_platform.is_cpu():
    pytest.skip("needs vLLM's CPU build", allow_module_level=True)

HEADS, PAGE, PAGES, MAX_LEN = 32, 64, 16, 192


class Case:
    """Requests with keys in a poisoned index cache, and a query for each of their last tokens."""

    def __init__(self, query_lens: list[int], seq_lens: list[int]) -> None:
        self.query_lens, self.seq_lens = query_lens, seq_lens
        self.starts = [0, *torch.tensor(query_lens).cumsum(0).tolist()]
        tokens = self.starts[-1]
        self.table = (torch.randperm(PAGES - 1)[: 3 * len(seq_lens)].reshape(-1, 3) + 1).int()
        self.cache = torch.full((PAGES, PAGE, 132), 0xFF, dtype=torch.uint8)
        self.q = torch.randn(tokens, HEADS, 128).to(torch.float8_e4m3fn)
        self.weights = torch.randn(tokens, HEADS)
        self.keys = [torch.randn(length, 128) for length in seq_lens]
        for keys, table in zip(self.keys, self.table, strict=True):
            position = torch.arange(len(keys))
            slots = table[position // PAGE].long() * PAGE + position % PAGE
            indexer_reference.write_index_cache(keys, self.cache, slots)

    def best(self, topk: int) -> list[set[int]]:
        """Positions of the best keys of each token, one at a time, in float64."""
        best = []
        for request, keys in enumerate(self.keys):
            codes, scales = indexer_reference.quantise_keys(keys)
            exact = codes.double() * scales.double().unsqueeze(-1)
            start, end = self.starts[request : request + 2]
            for token in range(start, end):
                visible = exact[: len(keys) - (end - token) + 1]
                scores = (self.q[token].double() @ visible.T).relu().T @ self.weights[token].double()
                best.append(set(scores.topk(min(topk, len(visible))).indices.tolist()))
        return best


def sets(indices: torch.Tensor) -> list[set[int]]:
    for row in indices.tolist():
        named = [i for i in row if i >= 0]
        assert len(named) == len(set(named)) and all(i >= -1 for i in row)
    return [{i for i in row if i >= 0} for row in indices.tolist()]


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's modules as they were, afterwards."""
    names = ("fp8_fp4_mqa_logits", "fp8_fp4_paged_mqa_logits", "has_deep_gemm", "ops", "get_indexer_topk")
    backend = builder.DeepseekV32IndexerBackend
    for module, attributes in (
        (layer, names),
        (builder, ("has_deep_gemm", "_supports_native_decode")),
        (backend, ("supports_batch_invariance",)),
    ):
        for name in attributes:
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    workspace.init_workspace_manager(torch.device("cpu"))
    yield
    workspace.reset_workspace_manager()


@pytest.mark.parametrize("products", [1 << 26, 40 * HEADS], ids=["at once", "in chunks"])
def test_cpu_indexer_picks_the_best_keys(products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer_cpu, "_MAX_PRODUCTS", products)
    lengths = [1, 70, random.randrange(65, MAX_LEN)]
    case = Case([1, 1, random.randrange(2, 60)], lengths)
    out = torch.full((case.starts[-1] + 2, 64), 77, dtype=torch.int32)
    meta = indexer_cpu.IndexerMetadata(case.starts, lengths, case.table, torch.zeros(0))
    indexer_cpu.select_keys(case.q, case.weights, case.cache, meta, 64, out)
    assert sets(out[:-2]) == case.best(64)
    assert (out[-2:] == 77).all()


def test_cpu_query_quantisation_is_the_models_call() -> None:
    x = torch.randn(6, 128).bfloat16()
    codes, scales = indexer_cpu.quantise_query(x, 128, column_major_scales=False, use_ue8m0=True)
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (6, 1)
    assert torch.equal(torch.exp2(torch.log2(scales).round()), scales)
    torch.testing.assert_close(codes.float() * scales, x.float(), rtol=1 / 16, atol=float(scales.max()) / 512)
    with pytest.raises(NotImplementedError, match="power-of-two"):
        indexer_cpu.quantise_query(x, 64, use_ue8m0=True)


def prefill_metadata(case: Case, first: int) -> tuple[Any, dict[str, Any]]:
    """vLLM's metadata of one prefill chunk with the requests from `first` on, and the chunk's fields."""
    lens = torch.tensor(case.seq_lens[first:], dtype=torch.int32)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lens.cumsum(0).int()])
    starts, ends = [], []
    for i, (query, length) in enumerate(zip(case.query_lens[first:], case.seq_lens[first:], strict=True)):
        starts += [int(bounds[i])] * query
        ends += [int(bounds[i]) + length - query + 1 + row for row in range(query)]
    fields: dict[str, Any] = {
        "block_table": case.table[first:],
        "cu_seqlen_ks": torch.tensor(starts, dtype=torch.int32),
        "cu_seqlen_ke": torch.tensor(ends, dtype=torch.int32),
        "cu_seq_lens": bounds,
        "token_to_seq": torch.zeros(int(bounds[-1]), dtype=torch.int32),
        "total_seq_lens": int(bounds[-1]),
        "token_start": case.starts[first],
        "token_end": case.starts[-1],
        "num_reqs": len(lens),
        "local_cu_seq_lens": bounds,
        "local_total_seq_lens": int(bounds[-1]),
        "max_local_total_seq_lens": int(bounds[-1]),
    }
    known = builder.DeepseekV32IndexerPrefillChunkMetadata.__dataclass_fields__
    if "max_seqlen_k" in known:  # 0.33
        fields["max_seqlen_k"] = int(lens.max())
    return builder.DeepseekV32IndexerPrefillMetadata(
        chunks=[builder.DeepseekV32IndexerPrefillChunkMetadata(**fields)]
    ), fields


@pytest.mark.parametrize("next_n", [1, 2])
@pytest.mark.parametrize("prefills", [0, 2])
def test_kernels_in_vllms_indexer(restored: None, monkeypatch: pytest.MonkeyPatch, next_n: int, prefills: int) -> None:
    """vLLM's `sparse_attn_indexer` itself, with what `install` puts into it."""
    monkeypatch.setenv("VLLM_FUSEDMLA_INDEXER", "1")
    indexer.install()
    indexer.install()  # plugins load many times
    assert builder.DeepseekV32IndexerBackend.supports_batch_invariance()
    decodes, topk = 2, 64
    query_lens = [next_n] * decodes + [random.randrange(2, 9) for _ in range(prefills)]
    seq_lens = [next_n, 150, *(random.randrange(70, 140) for _ in range(prefills))]
    case = Case(query_lens, seq_lens)
    decode_tokens, tokens = decodes * next_n, case.starts[-1]
    # As vLLM's builder makes them: keys that each row sees, 0 for a padding request.
    rows = torch.arange(next_n) - next_n + 1
    visible = (torch.tensor(seq_lens[:decodes]).unsqueeze(1) + rows).int()
    decode = builder.DeepSeekV32IndexerDecodeMetadata(
        block_table=case.table[:decodes],
        seq_lens=visible,
        decode_lens=torch.full((decodes,), next_n, dtype=torch.int32),
        requires_padding=False,
        schedule_metadata=torch.empty(0, dtype=torch.int32),
    )
    metadata = builder.DeepseekV32IndexerMetadata(
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        max_seq_len=max(seq_lens),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64),
        num_decodes=decodes,
        num_decode_tokens=decode_tokens,
        num_prefills=prefills,
        num_prefill_tokens=tokens - decode_tokens,
        decode=decode,
        prefill=prefill_metadata(case, decodes)[0] if prefills else None,
    )

    def gather(cache: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, table: Any, bounds: Any) -> None:
        k, k_scales = indexer_reference.gather_index_cache(cache, table, bounds)
        values[: len(k)] = k
        scales[: len(k)] = k_scales.unsqueeze(-1).view(torch.uint8)

    monkeypatch.setattr(_custom_ops, "cp_gather_indexer_k_quant_cache", gather)  # of CUDA builds only
    context = SimpleNamespace(attn_metadata={"indexer": metadata}, cudagraph_runtime_mode=CUDAGraphMode.NONE)
    monkeypatch.setattr(layer, "get_forward_context", lambda: context)
    buffer = torch.full((tokens, topk), 5, dtype=torch.int32)
    arguments = (torch.empty(tokens, 8), "indexer", case.cache, case.q, None, None, case.weights, 128, "ue8m0", topk)
    layer.sparse_attn_indexer(
        *arguments,
        head_dim=128,
        max_model_len=MAX_LEN,
        total_seq_lens=1024,
        topk_indices_buffer=buffer,
        skip_k_cache_insert=True,
        use_pcp=False,
        pcp_shard_decode_requests=False,
        dense_mha_metadata_layer_name="",
    )
    assert sets(buffer) == case.best(topk)


def test_install_without_being_asked_leaves_the_topk(restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_FUSEDMLA_INDEXER", raising=False)
    topk, ops = layer.get_indexer_topk, layer.ops
    indexer.install()
    assert layer.fp8_fp4_paged_mqa_logits is indexer.paged_mqa_logits
    assert (layer.get_indexer_topk, layer.ops) == (topk, ops)
    assert not builder.DeepseekV32IndexerBackend.supports_batch_invariance()  # of vLLM's top-k
    assert layer.has_deep_gemm() and not builder.has_deep_gemm()  # may be built; plans nothing


def test_scores_in_the_form_of_vllm_033() -> None:
    """A row's first key in column 0, and a given number of columns."""
    case = Case([3, 4], [80, 130])
    chunk = prefill_metadata(case, 0)[1]
    keys = indexer_reference.gather_index_cache(case.cache, case.table, chunk["cu_seq_lens"])
    starts, ends = chunk["cu_seqlen_ks"], chunk["cu_seqlen_ke"]
    wide = indexer.mqa_logits((case.q, None), keys, case.weights, starts, ends, clean_logits=True)
    narrow = indexer.mqa_logits((case.q, None), keys, case.weights, starts, ends, 130)
    assert wide.shape == (7, 210) and narrow.shape == (7, 130)
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        assert torch.equal(narrow[row, : end - start], wide[row, start:end])
        assert (wide[row, end:] == -math.inf).all() and (wide[row, :start] == -math.inf).all()


def test_warm_up_runs_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FUSEDMLA_INDEXER", "1")
    monkeypatch.setattr(indexer, "_MANY_TOKENS", 3)  # the interpreter is slow
    ran: list[str] = []

    def watch(name: str) -> None:
        kernel = getattr(indexer, name)

        def run(*arguments: Any) -> Any:
            ran.append(name)
            return kernel(*arguments)

        monkeypatch.setattr(indexer, name, run)

    for name in ("mqa_logits", "paged_mqa_logits", "prefill_topk", "decode_topk"):
        watch(name)
    indexer.warm_up(HEADS, 64, (1, 2), MAX_LEN, torch.device("cpu"))
    assert ran == ["mqa_logits", "prefill_topk"] * 2 + ["paged_mqa_logits", "decode_topk"] * 2


def test_other_index_caches_are_refused() -> None:
    q = torch.zeros(1, 1, HEADS, 128).to(torch.float8_e4m3fn), torch.zeros(1, 1, HEADS)
    cache, table = torch.zeros(2, PAGE, 1, 132, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.int32)
    lens = torch.ones(1, 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="MX scales"):
        indexer.paged_mqa_logits(q, cache, torch.zeros(1, HEADS), lens, table, None, 128)
    with pytest.raises(NotImplementedError, match="rows of different requests"):
        indexer.paged_mqa_logits((q[0], None), cache, torch.zeros(1, HEADS), lens, table, None, 128, indices=lens)


@pytest.mark.parametrize(
    ("choice", "deep_gemm", "offered"),
    [("auto", True, False), ("auto", False, True), ("0", False, False), ("1", True, True), ("1", False, True)],
)
def test_who_scores(choice: str, deep_gemm: bool, offered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FUSEDMLA_INDEXER", choice)
    monkeypatch.setattr(compat, "has_deep_gemm", lambda: deep_gemm)
    assert plugin.offers_indexer() is offered
