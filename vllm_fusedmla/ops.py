# SPDX-License-Identifier: Apache-2.0
"""The public Python API: MLA attention as torch.library operators, and FlashMLA's functions.

`mla_decode`, `mla_sparse_decode` and `mla_sparse_prefill` are one call each; `get_mla_metadata`,
`flash_mla_with_kvcache` and `flash_mla_sparse_fwd` take FlashMLA's arguments (both its generations,
github.com/deepseek-ai/FlashMLA), so that its users switch by changing an import. CUDA tensors run the kernels, CPU
tensors the PyTorch reference.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .checks import check_block_table, check_cache, check_query, require, require_contiguous, scale_parts
from .kernels import layout, reference
from .kernels.plan import batch_tiles, decode_plan
from .kernels.schedule import ITEM_FIELDS, ScheduleParams, TileSchedule, build_schedule, build_schedule_host
from .kernels.select import MAX_S_Q
from .sparse_ops import flash_mla_sparse_fwd as flash_mla_sparse_fwd
from .sparse_ops import mla_sparse_decode as mla_sparse_decode
from .sparse_ops import mla_sparse_prefill as mla_sparse_prefill

_METADATA_WIDTH = 8  # columns of FlashMLA's tile_scheduler_metadata


def mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float | None = None,
    causal: bool = True,
    k_scale: float | torch.Tensor | None = None,
    batch_invariant: bool = False,
    fp8_mma: bool = False,
    max_seq_len: int | None = None,
    schedule: TileSchedule | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last `s_q` tokens of each request over its paged MLA cache.

    Args:
        q: ``[b, s_q, h_q, 576]`` bf16 or fp16, 1 <= s_q <= 8, 1 <= h_q <= 128; latent part first, rope part last.
        cache: ``[num_pages, page_size, 576]`` bf16 or fp16 (q's dtype), or float8_e4m3fn or uint8 with `k_scale`; or
            ``[num_pages, page_size, 656]`` uint8 in the format `fp8_ds_mla` of `kernels.layout`, beside a bf16 q;
            page_size a multiple of 16; the page stride may be larger than a page.
        block_table: ``[b, max_pages]`` int32; entries past a request's last page are never used.
        seq_lens: ``[b]`` int32, keys of each request including its `s_q` new tokens; 0 for an empty request.
        sm_scale: softmax scale, ``576 ** -0.5`` by default.
        causal: query row i sees the keys before ``seq_len - s_q + 1 + i``; without it, all keys.
        k_scale: scale of an fp8 cache of width 576, a number or a float32 tensor of one element on q's device.
        batch_invariant: the same bits for a request whatever else is in the batch; takes about 64 KiB of scratch
            memory for each of the b x s_q x h_q query rows.
        fp8_mma: let fp8 tensor cores multiply where there is a kernel for it: a Hopper GPU, an fp8 cache of width 576,
            s_q x h_q > 32. Faster, but query and softmax weights are rounded to e4m3, each by up to 2^-4 of itself, so
            out and lse are less exact.
        max_seq_len: no element of seq_lens is greater, where that is known without asking the GPU: batches of few keys
            and more than 32 query rows are decoded by another kernel then, which may round differently.
        schedule: from `decode_schedule` with the same arguments, to share it among calls with the same lengths; the
            kernels for Hopper schedule themselves and ignore it.
        out: ``[b, s_q, h_q, 512]`` in q's dtype and lse ``[b, s_q, h_q]`` float32, contiguous, allocated if not given.

    Returns:
        out and lse (natural logarithm). A row without any key to attend to: out 0, lse -inf.

    Raises:
        ValueError: an argument has a wrong shape, dtype, stride or device.
    """
    _check(q, cache, block_table, seq_lens, k_scale)
    b, s_q, h_q, _ = q.shape
    out = q.new_empty(b, s_q, h_q, layout.D_V) if out is None else out
    lse = torch.empty(b, s_q, h_q, dtype=torch.float32, device=q.device) if lse is None else lse
    require("out", out, (b, s_q, h_q, layout.D_V), "[b, s_q, h_q, 512]", q.dtype, q.device)
    require("lse", lse, (b, s_q, h_q), "[b, s_q, h_q]", torch.float32, q.device)
    require_contiguous(out=out, lse=lse)
    if schedule is not None:
        _check_schedule(schedule, b, _plan_params(s_q * h_q, layout.cache_format(cache), seq_lens, batch_invariant))
    parts = (None, None, None) if schedule is None else (schedule.program_begin, schedule.items, schedule.num_splits)
    modes = (causal, batch_invariant, fp8_mma, max_seq_len)
    scale = scale_parts(k_scale)
    torch.ops.fusedmla.mla_decode(q, cache, block_table, seq_lens, out, lse, *scale, sm_scale, *modes, *parts)
    return out, lse


@torch.library.custom_op("fusedmla::mla_decode", mutates_args=("out", "lse"))
def _mla_decode_op(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    k_scale: torch.Tensor | None,
    k_scale_value: float,
    sm_scale: float | None,
    causal: bool,
    batch_invariant: bool,
    fp8_mma: bool,
    max_seq_len: int | None,
    program_begin: torch.Tensor | None,
    items: torch.Tensor | None,
    num_splits: torch.Tensor | None,
) -> None:
    scale = k_scale_value if k_scale is None else k_scale
    options: dict[str, Any] = {"sm_scale": sm_scale, "causal": causal, "k_scale": scale, "out": out, "lse": lse}
    if q.device.type != "cuda":
        reference.mla_decode(q, cache, block_table, seq_lens, **options)
        return
    from .kernels import dense_decode  # here, so that a CPU install needs no Triton

    b, s_q, h_q, _ = q.shape
    tiles = None if max_seq_len is None else batch_tiles(b, max_seq_len)
    plan = decode_plan(s_q, h_q, layout.cache_format(cache), q.device, batch_invariant, fp8_mma, tiles=tiles)
    schedule = None
    if program_begin is not None and items is not None and num_splits is not None:
        schedule = TileSchedule(program_begin, items, num_splits)
    with torch.cuda.device(q.device):  # kernels are launched on the current one
        dense_decode.mla_decode(q, cache, block_table, seq_lens, plan=plan, schedule=schedule, **options)


@_mla_decode_op.register_fake
def _(q, cache, block_table, seq_lens, out, lse, *args) -> None:
    return None


def decode_schedule(
    seq_lens: torch.Tensor, s_q: int, h_q: int, cache: torch.Tensor, *, batch_invariant: bool = False
) -> TileSchedule:
    """Schedule of `mla_decode` for these lengths, to be shared by all layers of a step (one kernel, no host sync).

    Args:
        seq_lens: ``[b]`` int32 on q's device.
        s_q, h_q: of the queries to come.
        cache: any layer's cache, for its format.
    """
    return _schedule(seq_lens, s_q * h_q, layout.cache_format(cache), batch_invariant)


def _schedule(seq_lens: torch.Tensor, rows: int, cache_format: str, batch_invariant: bool = False) -> TileSchedule:
    params = _plan_params(rows, cache_format, seq_lens, batch_invariant)
    on_gpu = seq_lens.device.type == "cuda"  # on a CPU nothing reads it, but callers may shape buffers by it
    if not on_gpu:
        return build_schedule_host(seq_lens, params)
    with torch.cuda.device(seq_lens.device):
        return build_schedule(seq_lens, params)


def _plan_params(rows: int, cache_format: str, seq_lens: torch.Tensor, batch_invariant: bool = False) -> ScheduleParams:
    return decode_plan(1, rows, cache_format, seq_lens.device, batch_invariant).params


@dataclass
class FlashMLASchedMeta:
    """Scheduler metadata of FlashMLA's newer generation: filled by the first call it is given to, then reused."""

    schedule: TileSchedule | None = None


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int = 1,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[torch.Tensor | FlashMLASchedMeta, torch.Tensor | None]:
    """Scheduler metadata for `flash_mla_with_kvcache`, with FlashMLA's arguments.

    Args:
        cache_seqlens: ``[b]`` int32. Without it the result is an object that the first decode call fills.
        num_q_tokens_per_head_k: ``s_q * h_q // h_k``.
        num_heads_k: 1.
        num_heads_q: not needed.
        is_fp8_kvcache: whether the cache will be fp8 of width 576. For one of width 656 give no arguments.
        topk: entries of a token's list in sparse attention, which needs no schedule: the result is a placeholder.

    Returns:
        tile_scheduler_metadata, ``[n, 8]`` int32, and num_splits, ``[b + 1]`` int32; both of fixed shape for a batch
        size, so that they can be copied into buffers of a CUDA graph. Their content is this project's own.
    """
    if num_heads_k != 1:
        raise ValueError(f"num_heads_k must be 1 for MLA, got {num_heads_k}")
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    if topk is not None:
        shapes = (1, _METADATA_WIDTH), (cache_seqlens.numel() + 1,)
        metadata, num_splits = (cache_seqlens.new_zeros(shape, dtype=torch.int32) for shape in shapes)
        return metadata, num_splits
    if num_q_tokens_per_head_k is None:
        raise ValueError("num_q_tokens_per_head_k must be s_q * h_q // h_k, got None")
    require("cache_seqlens", cache_seqlens, (cache_seqlens.numel(),), "[b]", torch.int32, cache_seqlens.device)
    if not cache_seqlens.is_contiguous():
        raise ValueError(f"cache_seqlens must be contiguous, got stride {cache_seqlens.stride(0)}")
    built = _schedule(cache_seqlens, num_q_tokens_per_head_k, "fp8" if is_fp8_kvcache else "bf16")
    flat = torch.cat([built.program_begin, built.items.flatten()])
    padding = -flat.numel() % _METADATA_WIDTH
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, _METADATA_WIDTH), built.num_splits


def _unpack_metadata(metadata: torch.Tensor, num_splits: torch.Tensor, params: ScheduleParams) -> TileSchedule:
    flat, begin = metadata.flatten(), params.num_programs + 1
    count = params.max_items(num_splits.numel() - 1) * ITEM_FIELDS
    if flat.numel() < begin + count:
        raise ValueError(
            f"tile_scheduler_metadata must hold at least {begin + count} integers for this batch and head count, "
            f"got {flat.numel()}: call get_mla_metadata with the same num_q_tokens_per_head_k and is_fp8_kvcache"
        )
    return TileSchedule(flat[:begin], flat[begin : begin + count].view(-1, ITEM_FIELDS), num_splits)


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int = layout.D_V,
    tile_scheduler_metadata: torch.Tensor | FlashMLASchedMeta | None = None,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    *,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
    enable_batch_invariant: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashMLA's decode with its arguments: dense, or sparse if `indices` are given.

    Args:
        q: ``[b, s_q, h_q, 576]`` bf16 or fp16; e4m3 with `descale_q` is taken too and computed in bf16.
        k_cache: ``[num_blocks, page_block_size, 1, 576]`` bf16, fp16, or e4m3 or uint8 with `descale_k`; or
            ``[num_blocks, page_block_size, 1, 656]`` uint8, as in `mla_decode`.
        block_table: ``[b, max_num_blocks_per_seq]`` int32; not used, and may be None, in sparse attention.
        cache_seqlens: ``[b]`` int32; not used, and may be None, in sparse attention.
        head_dim_v: 512.
        tile_scheduler_metadata, num_splits: from `get_mla_metadata`; built here if None; not used in sparse attention.
        softmax_scale: ``576 ** -0.5`` by default.
        causal: as in `mla_decode`; FlashMLA's default is False. Sparse attention cannot be causal: the lists decide.
        is_fp8_kvcache: not needed, the cache's dtype tells. Unlike FlashMLA's, sparse attention takes any cache.
        indices: ``[b, s_q, topk]`` int32, slots ``page * page_block_size + offset`` of the keys that a token attends
            to; negative entries and entries outside the cache name no key. Any topk, any h_q up to 128.
        attn_sink: ``[h_q]`` float32, only with `indices`, as in `mla_sparse_decode`; so is topk_length, ``[b]`` int32.
        extra_k_cache, extra_indices_in_kvcache, extra_topk_length: must be None, they belong to DeepSeek-V4.
        descale_q, descale_k: float32 tensors of one element.
        enable_batch_invariant: `batch_invariant` of `mla_decode` and `mla_sparse_decode`; a dense call takes no
            metadata of older FlashMLA's form then.
        out: ``[b, s_q, h_q, 512]``, allocated if not given.

    Returns:
        out ``[b, s_q, h_q, 512]`` and lse ``[b, h_q, s_q]`` float32, natural logarithm, without the sink. As in
        FlashMLA and unlike `mla_decode`, the lse of a row without any key is +inf.
    """
    if head_dim_v != layout.D_V:
        raise ValueError(f"head_dim_v must be {layout.D_V}, got {head_dim_v}")
    if k_cache.dim() != 4 or k_cache.shape[2] != 1:
        expected = "[num_blocks, page_block_size, 1, 576]"
        raise ValueError(f"k_cache must have shape {expected}, got {list(k_cache.shape)}")
    extra = (extra_k_cache, extra_indices_in_kvcache, extra_topk_length)
    if any(argument is not None for argument in extra):
        raise NotImplementedError("flash_mla_with_kvcache: extra_k_cache (DeepSeek-V4) is not supported")
    if q.dtype == torch.float8_e4m3fn:
        q = (q.float() * (1.0 if descale_q is None else descale_q)).to(torch.bfloat16)
    cache = k_cache.squeeze(2)
    shared: dict[str, Any] = {"sm_scale": softmax_scale, "k_scale": descale_k, "out": out}
    shared["batch_invariant"] = enable_batch_invariant
    if indices is not None:
        if causal:
            raise ValueError("causal must be False with indices, which say what a token attends to, got True")
        result, lse = mla_sparse_decode(q, cache, indices, topk_length=topk_length, attn_sink=attn_sink, **shared)
    else:
        if attn_sink is not None or topk_length is not None:
            raise ValueError("attn_sink and topk_length must be None without indices")
        if block_table is None or cache_seqlens is None:
            raise ValueError("block_table and cache_seqlens must be given without indices, got None")
        schedule = _flash_mla_schedule(
            tile_scheduler_metadata, num_splits, q, cache, cache_seqlens, enable_batch_invariant
        )
        result, lse = mla_decode(q, cache, block_table, cache_seqlens, causal=causal, schedule=schedule, **shared)
    return result, lse.masked_fill(lse == -torch.inf, torch.inf).transpose(1, 2)


def _flash_mla_schedule(
    metadata: torch.Tensor | FlashMLASchedMeta | None,
    num_splits: torch.Tensor | None,
    q: torch.Tensor,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    batch_invariant: bool,
) -> TileSchedule | None:
    """The schedule that metadata of either generation of FlashMLA stands for."""
    if metadata is None:
        return None
    s_q, h_q = q.shape[1:3]
    if isinstance(metadata, FlashMLASchedMeta):
        if metadata.schedule is None and q.device.type == "cuda":
            metadata.schedule = decode_schedule(seq_lens, s_q, h_q, cache, batch_invariant=batch_invariant)
        return metadata.schedule
    if num_splits is None:
        raise ValueError("num_splits must come with tile_scheduler_metadata, got None")
    name = layout.cache_format(cache)
    if name == "fp8_ds_mla":  # is_fp8_kvcache, and so the metadata, is about the other fp8 format
        raise ValueError("tile_scheduler_metadata of a k_cache of width 656 must come from get_mla_metadata()")
    return _unpack_metadata(metadata, num_splits, _plan_params(s_q * h_q, name, seq_lens))


def _check_schedule(schedule: TileSchedule, b: int, params: ScheduleParams) -> None:
    """Refuse the schedule of another launch: its slots may lie outside this launch's scratch memory."""
    got = [list(part.shape) for part in (schedule.program_begin, schedule.items, schedule.num_splits)]
    expected = [[params.num_programs + 1], [params.max_items(b), ITEM_FIELDS], [b + 1]]
    if got != expected:
        raise ValueError(
            "schedule must come from decode_schedule with this batch size, s_q, h_q, cache format and batch_invariant: "
            f"shapes of program_begin, items and num_splits {expected}, got {got}"
        )


def _check(q, cache, block_table, seq_lens, k_scale) -> None:
    """Refuse what the kernels cannot take; reads shapes and dtypes only, so it costs no synchronisation."""
    check_query(q, f"[b, s_q, h_q, {layout.D_QK}]")
    b, s_q, _, _ = q.shape
    if not 1 <= s_q <= MAX_S_Q:
        raise ValueError(f"q must have 1 <= s_q <= {MAX_S_Q}, got s_q = {s_q} in shape {list(q.shape)}")
    check_cache(cache, q, k_scale)
    if cache.shape[1] % 16:
        raise ValueError(f"cache must have a page_size that is a multiple of 16, got {cache.shape[1]}")
    check_block_table(block_table, b, q.device)
    require("seq_lens", seq_lens, (b,), "[b]", torch.int32, q.device)
    if not seq_lens.is_contiguous():
        raise ValueError(f"seq_lens must be contiguous, got stride {seq_lens.stride(0)}")
