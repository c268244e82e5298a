# SPDX-License-Identifier: Apache-2.0
"""Sparse MLA attention as torch.library operators, and FlashMLA's prefill function. Public through `ops`.

DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv 2512.02556): each query token has a list of the keys it attends to.
"""

from typing import Any

import torch

from .checks import (
    check_block_table,
    check_cache,
    check_query,
    require,
    require_contiguous,
    require_last_contiguous,
    scale_parts,
)
from .kernels import layout, sparse_reference
from .kernels.sparse_plan import sparse_plan


def mla_sparse_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    topk_length: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    sm_scale: float | None = None,
    k_scale: float | torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query token to the rows of a paged MLA cache that its list names.

    Args:
        q: ``[b, s_q, h_q, 576]`` bf16 or fp16, 1 <= h_q <= 128; latent part first, rope part last.
        cache: ``[num_pages, page_size, 576]`` bf16 or fp16 (q's dtype), or float8_e4m3fn or uint8 with `k_scale`; or
            ``[num_pages, page_size, 656]`` uint8 in the format `fp8_ds_mla` of `kernels.layout`, beside a bf16 q; any
            page_size; the page stride may be larger than a page.
        indices: ``[b, s_q, topk]`` int32 in any order, any topk, with a contiguous last dimension: slots
            ``page * page_size + offset`` of the cache, or with `block_table` positions within the request. Negative
            entries, and entries outside the cache or the block table, name no key, wherever in the list they are. A
            key that is named twice counts twice.
        topk_length: ``[b, s_q]`` or ``[b]`` int32, how many entries of a list count; all by default.
        block_table: ``[b, max_pages]`` int32, pages of each request.
        sm_scale: softmax scale, ``576 ** -0.5`` by default.
        k_scale: scale of an fp8 cache of width 576, a number or a float32 tensor of one element on q's device.
        attn_sink: ``[h_q]`` float32, contiguous: a score (natural units) that takes part in the sum by which the
            weights are divided, and has no value. -inf takes nothing, +inf everything.
        batch_invariant: the same bits for a token whatever else is in the batch.
        out: ``[b, s_q, h_q, 512]`` in q's dtype and lse ``[b, s_q, h_q]`` float32, contiguous, allocated if not given.

    Returns:
        out and lse (natural logarithm, without the sink). A token without keys: out 0, lse -inf.

    Raises:
        ValueError: an argument has a wrong shape, dtype, stride or device.
    """
    check_query(q, f"[b, s_q, h_q, {layout.D_QK}]")
    check_cache(cache, q, k_scale)
    b, s_q, h_q, _ = q.shape
    _check_lists(q, indices, (b, s_q), "b, s_q", topk_length, attn_sink)
    if block_table is not None:
        check_block_table(block_table, b, q.device)
    out = q.new_empty(b, s_q, h_q, layout.D_V) if out is None else out
    lse = torch.empty(b, s_q, h_q, dtype=torch.float32, device=q.device) if lse is None else lse
    require("out", out, (b, s_q, h_q, layout.D_V), "[b, s_q, h_q, 512]", q.dtype, q.device)
    require("lse", lse, (b, s_q, h_q), "[b, s_q, h_q]", torch.float32, q.device)
    require_contiguous(out=out, lse=lse)
    scale = scale_parts(k_scale)
    torch.ops.fusedmla.mla_sparse_decode(
        q, cache, indices, out, lse, topk_length, block_table, *scale, attn_sink, sm_scale, batch_invariant
    )
    return out, lse


@torch.library.custom_op("fusedmla::mla_sparse_decode", mutates_args=("out", "lse"))
def _mla_sparse_decode_op(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    topk_length: torch.Tensor | None,
    block_table: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    k_scale_value: float,
    attn_sink: torch.Tensor | None,
    sm_scale: float | None,
    batch_invariant: bool,
) -> None:
    options: dict[str, Any] = {"topk_length": topk_length, "block_table": block_table, "attn_sink": attn_sink}
    options |= {"sm_scale": sm_scale, "k_scale": k_scale_value if k_scale is None else k_scale, "out": out, "lse": lse}
    if q.device.type != "cuda":
        sparse_reference.mla_sparse_decode(q, cache, indices, **options)
        return
    from .kernels import sparse_decode  # here, so that a CPU install needs no Triton

    tokens = q.shape[0] * q.shape[1]
    plan = sparse_plan(q.shape[2], layout.cache_format(cache), q.device, batch_invariant, tokens=tokens)
    with torch.cuda.device(q.device):  # kernels are launched on the current one
        sparse_decode.mla_sparse_decode(q, cache, indices, plan=plan, **options)


@_mla_sparse_decode_op.register_fake
def _(q, cache, indices, out, lse, *args) -> None:
    return None


def mla_sparse_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    topk_length: torch.Tensor | None = None,
    sm_scale: float | None = None,
    k_scale: float | torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of each query token to the rows of `kv` that its list names; no batch dimension.

    Args:
        q: ``[s, h_q, 576]``; otherwise, as all arguments not named here, as in `mla_sparse_decode`.
        kv: ``[s_kv, 576]`` or ``[s_kv, 656]`` in any cache format, rows any multiple of 16 elements apart.
        indices: ``[s, topk]`` int32, rows of `kv`.
        topk_length: ``[s]`` int32.
        out: ``[s, h_q, 512]`` in q's dtype, contiguous, allocated if not given.

    Returns:
        out, max_logits ``[s, h_q]`` and lse ``[s, h_q]``, both float32 and without the sink: max_logits is the largest
        score times `sm_scale`. A token without keys: out 0, both -inf.

    Raises:
        ValueError: an argument has a wrong shape, dtype, stride or device.
    """
    check_query(q, f"[s, h_q, {layout.D_QK}]")
    if kv.dim() != 2:
        raise ValueError(f"kv must have shape [s_kv, width], got {list(kv.shape)}")
    check_cache(kv.unsqueeze(1), q, k_scale, "kv", "row")
    s, h_q, _ = q.shape
    _check_lists(q, indices, (s,), "s", topk_length, attn_sink)
    out = q.new_empty(s, h_q, layout.D_V) if out is None else out
    require("out", out, (s, h_q, layout.D_V), "[s, h_q, 512]", q.dtype, q.device)
    require_contiguous(out=out)
    max_logits, lse = (torch.empty(s, h_q, dtype=torch.float32, device=q.device) for _ in range(2))
    scale = scale_parts(k_scale)
    torch.ops.fusedmla.mla_sparse_prefill(
        q, kv, indices, out, max_logits, lse, topk_length, *scale, attn_sink, sm_scale, batch_invariant
    )
    return out, max_logits, lse


@torch.library.custom_op("fusedmla::mla_sparse_prefill", mutates_args=("out", "max_logits", "lse"))
def _mla_sparse_prefill_op(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    max_logits: torch.Tensor,
    lse: torch.Tensor,
    topk_length: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    k_scale_value: float,
    attn_sink: torch.Tensor | None,
    sm_scale: float | None,
    batch_invariant: bool,
) -> None:
    options: dict[str, Any] = {"topk_length": topk_length, "attn_sink": attn_sink, "sm_scale": sm_scale}
    options |= {"k_scale": k_scale_value if k_scale is None else k_scale}
    options |= {"out": out, "max_logits": max_logits, "lse": lse}
    if q.device.type != "cuda":
        sparse_reference.mla_sparse_prefill(q, kv, indices, **options)
        return
    from .kernels import sparse_decode

    name = layout.cache_format(kv.unsqueeze(1))
    plan = sparse_plan(q.shape[1], name, q.device, batch_invariant, prefill=True)
    with torch.cuda.device(q.device):
        sparse_decode.mla_sparse_prefill(q, kv, indices, plan=plan, **options)


@_mla_sparse_prefill_op.register_fake
def _(q, kv, indices, out, max_logits, lse, *args) -> None:
    return None


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = layout.D_V,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashMLA's sparse prefill with its arguments (github.com/deepseek-ai/FlashMLA; `out` is that of vLLM's fork).

    Args:
        q: ``[s_q, h_q, 576]`` bf16 or fp16; any h_q up to 128, where FlashMLA wants 64 or 128.
        kv: ``[s_kv, 1, 576]`` or ``[s_kv, 576]`` in q's dtype; or, unlike FlashMLA's, 656 wide and uint8, the format
            `fp8_ds_mla` of `kernels.layout`.
        indices: ``[s_q, 1, topk]`` int32, rows of `kv`; negative ones and those from s_kv on name no key. Any topk.
        sm_scale: softmax scale.
        d_v: 512.
        attn_sink: ``[h_q]`` float32, as in `mla_sparse_decode`.
        topk_length: ``[s_q]`` int32.
        out: ``[s_q, h_q, 512]`` in q's dtype, contiguous, allocated if not given.

    Returns:
        out, max_logits ``[s_q, h_q]`` and lse ``[s_q, h_q]``, float32, natural logarithm, without the sink. A token
        without keys: out 0, max_logits -inf and, as in FlashMLA and unlike `mla_sparse_prefill`, lse +inf.

    Raises:
        ValueError: an argument has a wrong shape, dtype, stride or device.
    """
    if d_v != layout.D_V:
        raise ValueError(f"d_v must be {layout.D_V}, got {d_v}")
    if kv.dim() == 3 and kv.shape[1] == 1:
        kv = kv.squeeze(1)
    if kv.dim() != 2:
        raise ValueError(f"kv must have shape [s_kv, 1, 576] or [s_kv, 576], got {list(kv.shape)}")
    if indices.dim() != 3 or indices.shape[1] != 1:
        raise ValueError(f"indices must have shape [s_q, 1, topk], got {list(indices.shape)}")
    result, max_logits, lse = mla_sparse_prefill(
        q, kv, indices.squeeze(1), topk_length=topk_length, sm_scale=sm_scale, attn_sink=attn_sink, out=out
    )
    return result, max_logits, lse.masked_fill_(lse == -torch.inf, torch.inf)


def _check_lists(
    q: torch.Tensor,
    indices: torch.Tensor,
    tokens: tuple[int, ...],
    meaning: str,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
) -> None:
    """Refuse wrong lists of keys; `tokens` are the query's leading dimensions, `meaning` their names."""
    if indices.dim() != len(tokens) + 1 or tuple(indices.shape[:-1]) != tokens:
        expected = ", ".join(map(str, tokens))
        raise ValueError(f"indices must have shape [{meaning}, topk] = [{expected}, *], got {list(indices.shape)}")
    require("indices", indices, tuple(indices.shape), f"[{meaning}, topk]", torch.int32, q.device)
    require_last_contiguous("indices", indices, "lists")
    if topk_length is not None:
        if tuple(topk_length.shape) not in {tokens, tokens[:1]}:
            forms = " or ".join(dict.fromkeys(str(list(shape)) for shape in (tokens, tokens[:1])))
            raise ValueError(f"topk_length must have shape {forms}, got {list(topk_length.shape)}")
        require("topk_length", topk_length, tuple(topk_length.shape), f"[{meaning}]", torch.int32, q.device)
    if attn_sink is not None:
        require("attn_sink", attn_sink, (q.shape[-2],), "[h_q]", torch.float32, q.device)
        require_contiguous(attn_sink=attn_sink)
