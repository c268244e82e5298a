# SPDX-License-Identifier: Apache-2.0
"""Portable sparse MLA attention in Triton, for decode and prefill: `sparse_kernel`, and `combine` for split lists.

DeepSeek Sparse Attention (DeepSeek-V3.2): an indexer lists for each query token the keys that it attends to.
"""

import torch

from . import layout
from .combine import combine
from .common import LOG2_E, dependent_launch, device_facts, interpreted
from .dense_decode import hopper_takes
from .reference import split_query
from .schedule import TileSchedule
from .select import DecodeConfig, select_sparse
from .sparse_decode_kernel import apply_sink_kernel, sparse_kernel
from .sparse_plan import SparsePlan, make_sparse_plan, sparse_plan


def mla_sparse_decode(
    q,
    cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    topk_length: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    sm_scale: float | None = None,
    k_scale: float | torch.Tensor = 1.0,
    attn_sink: torch.Tensor | None = None,
    plan: SparsePlan | None = None,
    workspace: tuple[torch.Tensor, ...] | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query token to the rows of a paged cache that its list names. Shapes and dtypes are trusted.

    Args:
        q: ``[b, s_q, h_q, 576]`` bf16 or fp16, or the tuple of its latent part ``[b, s_q, h_q, 512]`` and rope part
            ``[b, s_q, h_q, 64]``, each with any strides but a contiguous last dimension; bf16 for `fp8_ds_mla`.
        cache: ``[num_pages, page_size, width]``, see `layout`; any page size.
        indices: ``[b, s_q, topk]`` int32 in any order, with a contiguous last dimension: slots ``page * page_size +
            offset`` of the cache, or with `block_table` positions within the request. Negative entries and entries
            outside the cache or the block table, anywhere in the list, name no key.
        topk_length: ``[b, s_q]`` or ``[b]`` int32, how many entries of a list count; all by default.
        block_table: ``[b, max_pages]`` int32, pages of each request, or None.
        sm_scale: softmax scale, ``576 ** -0.5`` by default.
        k_scale: scale of an `fp8` cache, a number or a float32 tensor of one element on the device.
        attn_sink: ``[h_q]`` float32, contiguous: a score (natural units) that takes part in the sum by which the
            weights are divided, and has no value. -inf takes nothing, +inf everything.
        plan: from `sparse_plan.sparse_plan`, chosen if not given.
        workspace: contiguous float32 tensors of at least ``plan.workspace_shapes``, allocated if not given.
        out: ``[b, s_q, h_q, 512]`` in q's dtype, contiguous; lse: ``[b, s_q, h_q]`` float32, contiguous.

    Returns:
        out and lse (natural logarithm, without the sink). A token without keys: out 0, lse -inf.
    """
    q_nope, q_rope = split_query(q)
    b, s_q, h_q, _ = q_nope.shape
    out = q_nope.new_empty(b, s_q, h_q, layout.D_V) if out is None else out
    lse = torch.empty(b, s_q, h_q, dtype=torch.float32, device=q_nope.device) if lse is None else lse
    if plan is None:
        plan = sparse_plan(h_q, layout.cache_format(cache), q_nope.device, tokens=b * s_q)
    _attend(
        q_nope, q_rope, cache, indices, topk_length, block_table, sm_scale, k_scale, attn_sink, plan, workspace, out,
        lse, None,
    )  # fmt: skip
    return out, lse


def mla_sparse_prefill(
    q,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    topk_length: torch.Tensor | None = None,
    sm_scale: float | None = None,
    k_scale: float | torch.Tensor = 1.0,
    attn_sink: torch.Tensor | None = None,
    plan: SparsePlan | None = None,
    workspace: tuple[torch.Tensor, ...] | None = None,
    out: torch.Tensor | None = None,
    max_logits: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    with_max_logits: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Attention of each query token to the rows of `kv` that its list names; no batch dimension.

    Args:
        q: ``[s, h_q, 576]``, or its two parts; otherwise, as all arguments not named here, as in `mla_sparse_decode`.
        kv: ``[s_kv, width]`` in any format of `layout`, rows any distance apart.
        indices: ``[s, topk]`` int32, rows of `kv`.
        topk_length: ``[s]`` int32 or None.
        out: ``[s, h_q, 512]`` in q's dtype; max_logits, lse: ``[s, h_q]`` float32; all contiguous.
        with_max_logits: whether max_logits is wanted; the portable kernel and one for 16-bit caches and many heads know
            it, so without it the others can serve.

    Returns:
        out, max_logits and lse: max_logits is the largest score times `sm_scale`, -inf for a token without keys; None
        if not wanted.
    """
    q_nope, q_rope = (part.unsqueeze(1) for part in split_query(q))
    s, _, h_q, _ = q_nope.shape
    out = q_nope.new_empty(s, h_q, layout.D_V) if out is None else out
    if max_logits is None and with_max_logits:
        max_logits = torch.empty(s, h_q, dtype=torch.float32, device=q_nope.device)
    lse = torch.empty(s, h_q, dtype=torch.float32, device=q_nope.device) if lse is None else lse
    cache = kv.unsqueeze(1)
    if plan is None:
        plan = sparse_plan(h_q, layout.cache_format(cache), q_nope.device, prefill=True)
    _attend(
        q_nope, q_rope, cache, indices.unsqueeze(1), topk_length, None, sm_scale, k_scale, attn_sink, plan, workspace,
        out.unsqueeze(1), lse.unsqueeze(1), max_logits,
    )  # fmt: skip
    return out, max_logits, lse


def pipeline_stages(config: DecodeConfig, has_table: bool) -> int:
    """Triton's num_stages with which as many tiles are in flight as with `config.num_stages` for addresses known.

    Triton divides the stages among the loads that wait for each other: the entry, with a block table the page, the row.
    """
    return 1 + (config.num_stages - 1) * (3 if has_table else 2)


def _attend(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    block_table: torch.Tensor | None,
    sm_scale: float | None,
    k_scale: float | torch.Tensor,
    attn_sink: torch.Tensor | None,
    plan: SparsePlan,
    workspace: tuple[torch.Tensor, ...] | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_logits: torch.Tensor | None,
) -> None:
    b, s_q, h_q, _ = q_nope.shape
    tokens, topk = b * s_q, indices.shape[2]
    if tokens == 0:
        return
    sm_scale = layout.D_QK**-0.5 if sm_scale is None else sm_scale
    name = layout.cache_format(cache)
    wanting = max_logits is not None and not plan.gives_max_logits(name)
    if plan.on_hopper and (wanting or not hopper_takes(q_nope, q_rope, cache, sm_scale)):
        plan, workspace = portable_plan(plan, h_q, name, q_nope.device), None
    if plan.on_hopper:
        _attend_on_hopper(
            q_nope, q_rope, cache, indices, topk_length, block_table, sm_scale, attn_sink, plan, workspace, out, lse,
            max_logits,
        )  # fmt: skip
        return
    config, params = plan.config, plan.params
    pieces, piece_tiles = plan.pieces(tokens, topk)
    split = pieces > 1
    device = q_nope.device
    if workspace is None:
        shapes = plan.shapes_for(tokens * pieces if split else 1, tokens, h_q)
        workspace = tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
    partial_out, partial_lse = workspace[:2]
    num_splits = workspace[2].view(torch.int32)[: tokens + 1]
    partial_max = max_logits
    if max_logits is not None and split:
        partial_max = max_logits.new_empty(tokens, pieces, h_q)
    if block_table is None and cache.stride(0) == cache.shape[1] * cache.stride(1):
        cache = cache.flatten(0, 1).unsqueeze(1)  # slots are rows: no division by the page size
    eight_bit = name in ("fp8", "fp8_ds_mla")
    scale_is_tensor = isinstance(k_scale, torch.Tensor)
    page_stride = cache.stride(0) // 2 if eight_bit else cache.stride(0)
    # Copies of 16 bytes need proof of alignment; Triton sees it in strides of 16 elements. 656 bytes are 41 times 8.
    stride_unit = 8 if page_stride % 8 == 0 else 1
    # [b] counts for all s_q rows of a request
    length_strides = (0, 0) if topk_length is None else (*topk_length.stride(), 0)[:2]
    row_blocks = -(-h_q // config.block_h)
    sparse_kernel[(row_blocks * tokens * pieces,)](
        q_nope,
        q_rope,
        cache.view(torch.uint16) if eight_bit else cache,
        indices,
        indices if topk_length is None else topk_length,  # any pointer, as below, for what is not there
        indices if block_table is None else block_table,
        lse if attn_sink is None else attn_sink,
        out,
        lse,
        lse if partial_max is None else partial_max,
        partial_out,
        partial_lse,
        num_splits,
        k_scale if scale_is_tensor else lse,
        1.0 if scale_is_tensor else float(k_scale),
        sm_scale * LOG2_E,
        *q_nope.stride()[:3],
        *q_rope.stride()[:3],
        *indices.stride()[:2],
        *length_strides,
        page_stride // stride_unit,
        0 if block_table is None else block_table.stride(0),
        s_q,
        topk,
        cache.shape[0],
        0 if block_table is None else block_table.shape[1],
        pieces,
        piece_tiles,
        H_Q=h_q,
        PAGE_SIZE=cache.shape[1],
        STRIDE_UNIT=stride_unit,
        HAS_TABLE=block_table is not None,
        HAS_LENGTH=topk_length is not None,
        HAS_SINK=attn_sink is not None,
        HAS_MAX=max_logits is not None,
        EIGHT_BIT=eight_bit,
        DS_MLA=name == "fp8_ds_mla",
        K_SCALE_POINTER=name == "fp8" and scale_is_tensor,
        BLOCK_H=config.block_h,
        BLOCK_N=config.block_n,
        GROUPS=config.groups,
        INTERPRETED=interpreted(),
        **dependent_launch(device),
        num_warps=config.num_warps,
        num_stages=pipeline_stages(config, block_table is not None),
    )
    if not split:
        return
    out_rows, lse_rows = out.view(tokens, 1, h_q, layout.D_V), lse.view(tokens, 1, h_q)
    # `combine` wants to know where each token's pieces end, and nothing else of a schedule
    combine(partial_out, partial_lse, TileSchedule(num_splits, num_splits, num_splits), params, out_rows, lse_rows)
    if attn_sink is not None:
        apply_sink(out, lse, attn_sink)
    if max_logits is not None and partial_max is not None:
        torch.amax(partial_max, 1, out=max_logits)


def apply_sink(out: torch.Tensor, lse: torch.Tensor, attn_sink: torch.Tensor) -> None:
    """Lets the sinks take their part of results that were computed without them."""
    h_q = lse.shape[-1]
    apply_sink_kernel[(lse.numel(),)](out, lse, attn_sink, H_Q=h_q, **dependent_launch(out.device), num_warps=1)


def portable_plan(plan: SparsePlan, h_q: int, cache_format: str, device: torch.device) -> SparsePlan:
    """The portable kernel's plan for a call that the Hopper kernels do not take."""
    arch, num_sms = device_facts(device)
    params = plan.params
    return make_sparse_plan(
        select_sparse(arch, h_q, cache_format), h_q, num_sms, params.batch_invariant, params.max_splits
    )


def _attend_on_hopper(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    block_table: torch.Tensor | None,
    sm_scale: float,
    attn_sink: torch.Tensor | None,
    plan: SparsePlan,
    workspace: tuple[torch.Tensor, ...] | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_logits: torch.Tensor | None,
) -> None:
    from .hopper.sparse import list_lengths, sparse_decode  # here, for they need the driver's interface

    b, s_q, h_q, _ = q_nope.shape
    device = q_nope.device
    if workspace is None:
        shapes = plan.workspace_shapes(b, s_q, h_q)[:2]
        workspace = tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
    lengths = list_lengths(topk_length, b, s_q, indices.shape[2])
    sparse_decode(
        q_nope, q_rope, cache, indices, lengths, block_table, out, lse, workspace, plan=plan, sm_scale=sm_scale,
        max_logits=max_logits,
    )  # fmt: skip
    if attn_sink is not None:
        apply_sink(out, lse, attn_sink)
