# SPDX-License-Identifier: Apache-2.0
"""This project's kernels inside vLLM's indexer on GPUs: key scores in DeepGEMM's place, and if asked for the top-k.

vLLM's ``sparse_attn_indexer`` writes the index cache, splits a step into prefill chunks and decodes, and merges across
ranks; it calls DeepGEMM for the scores of keys, twice, and operators of its own for the top-k. Only these calls are
replaced, so everything that vLLM builds around them keeps working. Their signatures differ between vLLM 0.32 and 0.33:
the functions here take both.

DeepGEMM compiles its kernels when they are first called, with a CUDA compiler that it must find on the machine; the
kernels here need none.
"""

from __future__ import annotations

from typing import Any

import torch

from . import compat, envs

MAX_QUERY_LEN = 8
"""Most tokens of a request whose scores are computed together; with more, vLLM makes requests of the tokens."""
_MANY_TOKENS = 256
"""More than an H200 has multiprocessors, so that the top-k takes one program a row."""


def _values(q: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    values, scales = q
    if scales is not None:
        raise NotImplementedError(
            "VLLM_FUSEDMLA_INDEXER: index caches with MX scales (compute capability 10.x, indexer_kv_dtype=mxfp4) "
            "are not supported, set it to 0"
        )
    return values


def mqa_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    max_seqlen_k: int | None = None,
    *,
    clean_logits: bool = False,
) -> torch.Tensor:
    """Stands in for DeepGEMM's ``fp8_fp4_mqa_logits``: scores of a prefill chunk's gathered keys.

    Args:
        q: ``[T, heads, 128]`` e4m3, and None.
        kv: ``[S, 128]`` e4m3 and ``[S]`` float32 scales.
        weights: ``[T, heads]`` float32.
        starts, ends: ``[T]`` int32, the keys that each token sees.
        max_seqlen_k: given by vLLM 0.33, which wants a row's first key in column 0 and so many columns.
        clean_logits: given by vLLM 0.32: whether columns outside a row's keys are -inf.

    Returns:
        ``[T, S]`` or ``[T, max_seqlen_k]`` float32.
    """
    from .kernels.indexer import index_logits_ragged

    return index_logits_ragged(_values(q), *kv, weights, starts, ends, max_len=max_seqlen_k, clean=clean_logits)


def paged_mqa_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    schedule_metadata: Any,
    max_model_len: int,
    *,
    clean_logits: bool = False,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stands in for DeepGEMM's ``fp8_fp4_paged_mqa_logits``: scores of all keys of the requests that are decoded.

    Args:
        q: ``[b, s_q, heads, 128]`` e4m3, and None.
        kv_cache: ``[num_pages, 64, 1, 132]`` uint8.
        weights: ``[b * s_q, heads]`` float32.
        context_lens: ``[b, s_q]`` int32, keys that each token sees.
        block_tables: ``[b, max_pages]`` int32.
        schedule_metadata: DeepGEMM's, ignored.
        max_model_len: columns of the result.
        clean_logits: given by vLLM 0.32: whether columns past a row's keys are -inf.
        indices: must be None; vLLM gives it on compute capability 10.x.

    Returns:
        ``[b * s_q, max_model_len]`` float32.
    """
    from .kernels.indexer import index_logits_paged

    if indices is not None:
        raise NotImplementedError("VLLM_FUSEDMLA_INDEXER: rows of different requests in one are not supported")
    if block_tables.stride(-1) != 1:  # one column, of a transposed table
        block_tables = block_tables.clone(memory_format=torch.contiguous_format)
    cache = kv_cache.squeeze(2)
    return index_logits_paged(_values(q), cache, weights, context_lens, block_tables, max_model_len, clean=clean_logits)


class _Workspace:
    """Scratch memory of the top-k kernel, which is all zeros between launches."""

    def __init__(self) -> None:
        self._of_device: dict[torch.device, torch.Tensor] = {}

    def options(self, device: torch.device) -> dict[str, Any]:
        """Arguments of `topk_indices`: the memory, or one program a row where it cannot be made now."""
        from .kernels.common import device_facts
        from .kernels.topk import topk_workspace

        if device not in self._of_device:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return {"parts": 1}  # zeros made in a capture are zeros when the graph runs, not now
            self._of_device[device] = topk_workspace(device_facts(device)[1], device)
        return {"workspace": self._of_device[device]}


_workspace = _Workspace()


def prefill_topk(
    logits: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    indices: torch.Tensor,
    num_rows: int,
    stride0: int,
    stride1: int,
    topk: int,
) -> None:
    """Stands in for vLLM's ``top_k_per_row_prefill``.

    Args:
        logits: ``[num_rows, columns]`` float32.
        starts, ends: ``[num_rows]`` int32, the columns of each row to choose from.
        indices: ``[num_rows, topk]`` int32, written: relative to the row's start, -1 where there are fewer.
        num_rows, stride0, stride1: of logits, ignored.
        topk: indices a row.
    """
    from .kernels.topk import topk_indices

    topk_indices(logits, (starts, ends), topk, out=indices, **_workspace.options(logits.device))


def decode_topk(
    logits: torch.Tensor, seq_lens: torch.Tensor, next_n: int, indices: torch.Tensor, topk: int, max_seq_len: int
) -> None:
    """Stands in for vLLM's top-k of decodes.

    Args:
        logits: ``[b * next_n, columns]`` float32.
        seq_lens: ``[b, next_n]`` int32 columns that each row sees, or ``[b, 1]``, of the last of each request's rows.
        next_n: rows a request.
        indices: ``[b * next_n, topk]`` int32, written: -1 where there are fewer.
        topk: indices a row.
        max_seq_len: ignored.
    """
    from .kernels.topk import topk_indices

    topk_indices(logits, seq_lens.reshape(-1), topk, out=indices, **_workspace.options(logits.device))


def warm_up(heads: int, topk: int, query_lens: tuple[int, ...], max_len: int, device: torch.device) -> None:
    """Compile or load the kernels before the first request, for few tokens and for many, on keys of nobody.

    Args:
        heads: of the indexer.
        topk: keys that it picks.
        query_lens: tokens of a request that is decoded.
        max_len: most keys of a request, which decides how the top-k divides a row.
        device: of the queries.
    """
    own_topk = envs.VLLM_FUSEDMLA_INDEXER == "1"

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def query(*shape: int) -> tuple[torch.Tensor, None]:
        return zeros(*shape, heads, 128, dtype=torch.uint8).view(torch.float8_e4m3fn), None

    keys = zeros(64, 128, dtype=torch.uint8).view(torch.float8_e4m3fn), zeros(64)
    width = (64,) if compat.scores_are_compressed() else ()
    for tokens in (1, _MANY_TOKENS):
        empty, picked = zeros(tokens, dtype=torch.int32), zeros(tokens, topk, dtype=torch.int32)
        mqa_logits(query(tokens), keys, zeros(tokens, heads), empty, empty, *width)
        if own_topk:
            prefill_topk(zeros(tokens, max_len), empty, empty, picked, tokens, max_len, 1, topk)
    cache, table = zeros(1, 64, 1, 132, dtype=torch.uint8), zeros(1, 1, dtype=torch.int32)
    for s_q in query_lens:
        lens, picked = zeros(1, s_q, dtype=torch.int32), zeros(s_q, topk, dtype=torch.int32)
        scores = paged_mqa_logits(query(1, s_q), cache, zeros(s_q, heads), lens, table, None, max_len)
        if own_topk:
            decode_topk(scores, lens, s_q, picked, topk, max_len)


def install() -> None:
    """Put this project's kernels into vLLM's indexer; the top-k with VLLM_FUSEDMLA_INDEXER=1 only."""
    compat.replace_deep_gemm(mqa_logits, paged_mqa_logits, MAX_QUERY_LEN)
    if envs.VLLM_FUSEDMLA_INDEXER == "1":
        compat.replace_indexer_topk(prefill_topk, decode_topk)
        compat.allow_batch_invariant_indexer()
