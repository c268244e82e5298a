# SPDX-License-Identifier: Apache-2.0
"""Portable split-KV MLA decode in Triton: schedule, `dense_decode_kernel`, `combine`."""

import torch
import triton

from . import layout
from .combine import combine
from .common import LOG2_E, dependent_launch, device_facts, interpreted
from .dense_decode_kernel import decode_kernel
from .plan import DecodePlan, decode_plan, make_plan
from .reference import split_query
from .schedule import TileSchedule, build_schedule
from .select import select_portable


def mla_decode(
    q,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float | None = None,
    causal: bool = True,
    k_scale: float | torch.Tensor = 1.0,
    plan: DecodePlan | None = None,
    schedule: TileSchedule | None = None,
    workspace: tuple[torch.Tensor, ...] | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last `s_q` tokens of each request over its paged cache. Inputs are trusted; `ops` checks them.

    Args:
        q: ``[b, s_q, h_q, 576]`` bf16 or fp16, or the tuple of its latent part ``[b, s_q, h_q, 512]`` and rope part
            ``[b, s_q, h_q, 64]``, each with any strides but a contiguous last dimension; bf16 for `fp8_ds_mla`.
        cache: ``[num_pages, page_size, width]``, see `layout`; page_size a multiple of 16.
        block_table: ``[b, max_pages]`` int32; entries past a request's last page are never read.
        seq_lens: ``[b]`` int32, keys of each request including its `s_q` new tokens; 0 for an empty request.
        sm_scale: softmax scale, ``576 ** -0.5`` by default.
        causal: query row i sees the keys before ``seq_len - s_q + 1 + i``; without it, all keys.
        k_scale: scale of an `fp8` cache, a number or a float32 tensor of one element on the device.
        plan: from `plan.decode_plan`, chosen if not given.
        schedule: from `schedule.build_schedule` with ``plan.params``, built if not given; the Hopper kernels need none.
        workspace: float32 tensors of at least ``plan.workspace_shapes``, allocated if not given.
        out: ``[b, s_q, h_q, 512]`` in q's dtype, contiguous; lse: ``[b, s_q, h_q]`` float32, contiguous.

    Returns:
        out and lse (natural logarithm). A row without any key to attend to: out 0, lse -inf.
    """
    q_nope, q_rope = split_query(q)
    b, s_q, h_q, _ = q_nope.shape
    device = q_nope.device
    name = layout.cache_format(cache)
    out = q_nope.new_empty(b, s_q, h_q, layout.D_V) if out is None else out
    lse = torch.empty(b, s_q, h_q, dtype=torch.float32, device=device) if lse is None else lse
    if b == 0:
        return out, lse
    plan = decode_plan(s_q, h_q, name, device) if plan is None else plan
    sm_scale = layout.D_QK**-0.5 if sm_scale is None else sm_scale
    if plan.on_hopper and not hopper_takes(q_nope, q_rope, cache, sm_scale):
        plan, schedule, workspace = portable_plan(plan, s_q * h_q, name, device), None, None
    config, params = plan.config, plan.params
    if workspace is None:
        workspace = tuple(
            torch.empty(s, dtype=torch.float32, device=device) for s in plan.workspace_shapes(b, s_q, h_q)
        )
    if plan.on_hopper:
        from .hopper.decode import decode  # here, for it needs the driver's interface

        decode(
            q_nope, q_rope, cache, block_table, seq_lens, out, lse, workspace,
            plan=plan, sm_scale=sm_scale, causal=causal, k_scale=k_scale,
        )  # fmt: skip
        return out, lse
    schedule = build_schedule(seq_lens, params) if schedule is None else schedule
    partial_out, partial_lse = workspace
    eight_bit = name in ("fp8", "fp8_ds_mla")
    scale_is_tensor = isinstance(k_scale, torch.Tensor)
    decode_kernel[(triton.cdiv(s_q * h_q, config.block_h), params.num_programs)](
        q_nope,
        q_rope,
        cache.view(torch.uint16) if eight_bit else cache,
        block_table,
        seq_lens,
        schedule.program_begin,
        schedule.items,
        out,
        lse,
        partial_out,
        partial_lse,
        k_scale if scale_is_tensor else lse,  # any pointer: read only if K_SCALE_POINTER
        1.0 if scale_is_tensor else float(k_scale),
        sm_scale * LOG2_E,
        *q_nope.stride()[:3],
        *q_rope.stride()[:3],
        cache.stride(0) // 2 if eight_bit else cache.stride(0),
        block_table.stride(0),
        S_Q=s_q,
        H_Q=h_q,
        PAGE_SIZE=cache.shape[1],
        CAUSAL=causal and s_q > 1,
        EIGHT_BIT=eight_bit,
        DS_MLA=name == "fp8_ds_mla",
        K_SCALE_POINTER=name == "fp8" and scale_is_tensor,
        BLOCK_H=config.block_h,
        BLOCK_N=config.block_n,
        INTERPRETED=interpreted(),
        **dependent_launch(device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if params.max_pieces() > 1:
        combine(partial_out, partial_lse, schedule, params, out, lse)
    return out, lse


def hopper_takes(q_nope: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, sm_scale: float) -> bool:
    """Whether addresses and strides suit the copy engine and 16-byte loads, and larger scores are larger products."""
    page_bytes = cache.stride(0) * cache.element_size()
    starts = [t.data_ptr() for t in (q_nope, q_rope, cache)]
    strides = [stride for q in (q_nope, q_rope) for stride in q.stride()[:3]]
    return sm_scale > 0 and all(n % 16 == 0 for n in (page_bytes, *starts)) and all(n % 8 == 0 for n in strides)


def portable_plan(plan: DecodePlan, rows: int, cache_format: str, device: torch.device) -> DecodePlan:
    """The portable kernel's plan for a call that the Hopper kernels do not take."""
    arch, num_sms = device_facts(device)
    params = plan.params
    config = select_portable(arch, rows, cache_format)
    return make_plan(config, rows, num_sms, params.batch_invariant, params.max_splits)
