# SPDX-License-Identifier: Apache-2.0
"""The public API of sparse attention: operators, FlashMLA's functions, and what they say about wrong arguments."""

import random
import re

import pytest
import torch
from problems import FORMATS, LSE_TOLERANCE, SPARSE_OUT_TOLERANCE, assert_matches, cosine_difference, random_lengths
from sparse_problems import TOO_FAR, make_sparse_problem

from vllm_fusedmla import ops
from vllm_fusedmla.kernels import sparse_reference


def sink_of(h_q, device):
    return torch.randn(h_q, device=device) * 3


def prefill_problem(cache_format, device, **options):
    """Six tokens, one of them without keys, over rows of one kv: the problem, q, kv and indices."""
    problem = make_sparse_problem(
        [200, 0, 64, 17, 300, 5], h_q=6, topk=128, cache_format=cache_format, device=device, slots=True, **options
    )
    return problem, problem.q[:, 0], problem.cache.flatten(0, 1), problem.indices[:, 0]


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("slots", [False, True])
def test_sparse_decode_computes_attention(cache_format, slots, device):
    problem = make_sparse_problem(
        [40, 0, *random_lengths(2, 300)], h_q=random.choice([1, 5, 16]), s_q=2, topk=192, page_size=48,
        cache_format=cache_format, device=device, slots=slots, lengths=True, sink=True,
    )  # fmt: skip
    out, lse = ops.mla_sparse_decode(*problem.arguments(), k_scale=problem.k_scale, **problem.keywords())
    assert out.dtype == problem.q.dtype and lse.dtype == torch.float32
    assert_matches(problem, out, lse)
    given = torch.empty_like(out), torch.empty_like(lse)
    result = ops.mla_sparse_decode(
        *problem.arguments(), k_scale=problem.k_scale, **problem.keywords(), out=given[0], lse=given[1]
    )
    assert result[0] is given[0] and result[1] is given[1]
    assert torch.equal(given[0], out) and torch.equal(given[1], lse)


def test_batch_invariant_mode_and_scale(device):
    problem = make_sparse_problem([300, 70], h_q=4, topk=256, device=device, slots=True)
    q, cache, indices = problem.arguments()
    out, lse = ops.mla_sparse_decode(q, cache, indices, batch_invariant=True)
    assert_matches(problem, out, lse)
    alone, alone_lse = ops.mla_sparse_decode(q[1:], cache, indices[1:], batch_invariant=True)
    assert torch.equal(alone[0], out[1]) and torch.equal(alone_lse[0], lse[1])
    out, lse = ops.mla_sparse_decode(q, cache, indices, sm_scale=0.01)
    assert_matches(problem, out, lse, sm_scale=0.01)


def test_operator_registrations_are_sound(device):
    problem = make_sparse_problem([40, 9], h_q=4, s_q=2, topk=64, device=device, slots=True, lengths=True, sink=True)
    problem.cache.zero_()  # a poisoned cache is no input for a check that compares numbers: NaN differs from NaN
    q, cache, indices = problem.arguments()
    out, lse = torch.empty(2, 2, 4, 512, dtype=q.dtype, device=device), torch.empty(2, 2, 4, device=device)
    length, sink = problem.options["topk_length"], problem.options["attn_sink"]
    decode = (q, cache, indices, out, lse, length, None, None, 1.0, sink, None, False)
    torch.library.opcheck(torch.ops.fusedmla.mla_sparse_decode.default, decode)
    flat = (q[:, 0].contiguous(), cache.flatten(0, 1), indices[:, 0].contiguous(), out[:, 0].contiguous())
    prefill = (*flat, lse[:, 0].contiguous(), lse[:, 1].contiguous(), None, None, 1.0, sink, 0.1, True)
    torch.library.opcheck(torch.ops.fusedmla.mla_sparse_prefill.default, prefill)


def test_torch_compile_keeps_them_in_the_graph(device):
    problem, q, kv, indices = prefill_problem("bf16", device)

    def step(q, kv, cache, indices):
        out, lse = ops.mla_sparse_decode(q.unsqueeze(1), cache, indices.unsqueeze(1))
        return out * 2, lse, *ops.mla_sparse_prefill(q, kv, indices)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    arguments = (q, kv, problem.cache, indices)
    for got, want in zip(compiled(*arguments), step(*arguments), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_sparse_decode_in_a_cuda_graph(device):
    """No call synchronises: a capture would fail."""
    problem = make_sparse_problem([300, 40], h_q=16, topk=128, cache_format="fp8_ds_mla", device=device, slots=True)
    q, cache, indices = problem.arguments()

    def step():
        return (
            *ops.mla_sparse_decode(q, cache, indices),
            *ops.flash_mla_sparse_fwd(q[:, 0], cache.flatten(0, 1), indices, 576**-0.5),
            *ops.flash_mla_with_kvcache(q, cache.unsqueeze(2), None, None, indices=indices),
        )

    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cache_format", ["bf16", "fp8_ds_mla"])
def test_flash_mla_with_kvcache_on_lists(cache_format, device):
    problem = make_sparse_problem(
        [150, 0, 70], h_q=8, s_q=2, topk=128, cache_format=cache_format, device=device, slots=True
    )
    q, cache, indices = problem.arguments()
    sink, length = sink_of(8, device), torch.tensor([128, 64, 100], dtype=torch.int32, device=device)
    problem.options = {"topk_length": length, "attn_sink": sink}
    newer, older = ops.get_mla_metadata(), ops.get_mla_metadata(length, 16, 1, 8, True, 128)
    for part, shape in zip(older, [(1, 8), (4,)], strict=True):
        assert isinstance(part, torch.Tensor) and part.dtype == torch.int32 and part.shape == shape
    fp8 = cache_format == "fp8_ds_mla"
    for metadata, splits in (newer, newer, older, (None, None)):
        # the older generation's callers pass a table and lengths, which mean nothing here
        table, lens = (None, None) if splits is None else (problem.block_table, problem.seq_lens)
        out, lse = ops.flash_mla_with_kvcache(
            q, cache.unsqueeze(2), table, lens, 512, metadata, splits, None, False, fp8, indices, sink, None, None,
            length,
        )  # fmt: skip
        assert lse.shape == (3, 8, 2) and (lse[1] == torch.inf).all()  # FlashMLA's sign for a row without keys
        assert_matches(problem, out, lse.transpose(1, 2).masked_fill(lse.transpose(1, 2) == torch.inf, -torch.inf))


def test_flash_mla_with_kvcache_refuses_what_contradicts_lists(device):
    problem = make_sparse_problem([50], h_q=4, topk=64, device=device, slots=True)
    q, cache, indices = problem.arguments()
    with pytest.raises(ValueError, match="causal must be False with indices"):
        ops.flash_mla_with_kvcache(q, cache.unsqueeze(2), None, None, causal=True, indices=indices)
    with pytest.raises(NotImplementedError, match="DeepSeek-V4"):
        ops.flash_mla_with_kvcache(q, cache.unsqueeze(2), None, None, indices=indices, extra_indices_in_kvcache=indices)


@pytest.mark.parametrize("cache_format", ["bf16", "fp16", "fp8_ds_mla"])
@pytest.mark.parametrize("layout_of_kv", ["rows", "heads", "spread"])
def test_flash_mla_sparse_fwd(cache_format, layout_of_kv, device):
    """FlashMLA's conventions: natural logarithms, max_logits -inf and lse +inf for tokens without keys."""
    problem, q, kv, indices = prefill_problem(cache_format, device, lengths=True, sink=True)
    indices[3] = random.choice([-1, -(2**31), kv.shape[0], TOO_FAR])
    if layout_of_kv == "heads":
        kv = kv.unsqueeze(1)
    elif layout_of_kv == "spread":
        kv = torch.cat([kv.view(torch.uint8)] * 3, 1).view(kv.dtype)[:, : kv.shape[1]]
    length, sink = problem.options["topk_length"].flatten(), problem.options["attn_sink"]
    given = torch.empty(6, 6, 512, dtype=q.dtype, device=device) if random.random() < 0.5 else None
    scale = random.uniform(0.02, 0.05)
    out, max_logits, lse = ops.flash_mla_sparse_fwd(q, kv, indices.unsqueeze(1), scale, 512, sink, length, given)
    assert given is None or out is given
    want, want_max, want_lse = sparse_reference.mla_sparse_prefill(
        q.double(), problem.cache.flatten(0, 1), indices, topk_length=length, sm_scale=scale, attn_sink=sink,
        compute_dtype=torch.float64,
    )  # fmt: skip
    empty = want_lse == -torch.inf
    assert empty[1].all() and empty[3].all() and not empty.all()
    assert (out[empty] == 0).all() and (lse[empty] == torch.inf).all() and (max_logits[empty] == -torch.inf).all()
    absolute, relative, cosine = SPARSE_OUT_TOLERANCE
    assert ((out.double() - want).abs() <= torch.clamp(want.abs() * relative, min=absolute)).all()
    assert cosine_difference(out, want) < cosine
    for got, expected in ((max_logits, want_max), (lse, want_lse)):
        torch.testing.assert_close(got.double()[~empty], expected[~empty], rtol=LSE_TOLERANCE[1], atol=2e-5)


def test_prefill_in_this_projects_convention(device):
    problem, q, kv, indices = prefill_problem("fp8", device)
    out, max_logits, lse = ops.mla_sparse_prefill(q, kv, indices, k_scale=problem.k_scale)
    assert_matches(problem, out.unsqueeze(1), lse.unsqueeze(1))
    assert (max_logits <= lse).all() and (max_logits[1] == -torch.inf).all()


def spread_by_8(t):
    """The same shape, outermost parts 8 elements further apart."""
    return t.new_empty(t.shape[0], t[0].numel() + 8)[:, :-8].unflatten(1, t.shape[1:])


DECODE_ERRORS = [
    ("q", lambda t: t[0], "q must have shape [b, s_q, h_q, 576], got [2, 4, 576]"),
    ("q", lambda t: t[..., :512], "q must have shape [b, s_q, h_q, 576], got [3, 2, 4, 512]"),
    ("q", lambda t: t.repeat(1, 1, 33, 1), "q must have 1 <= h_q <= 128, got h_q = 132"),
    ("q", lambda t: t.to(torch.int8), "got torch.int8"),
    ("q", lambda t: t.mT.contiguous().mT, "q must be contiguous in its last dimension"),
    ("cache", lambda t: t[..., :320], "cache must be one of"),
    ("cache", lambda t: t.to("meta"), "cache must be on q's device"),
    ("cache", lambda t: spread_by_8(t), "cache must have a page stride that is a multiple of 16 elements, got 36872"),
    ("indices", lambda t: t[:, 0], "indices must have shape [b, s_q, topk] = [3, 2, *], got [3, 64]"),
    ("indices", lambda t: t[:2], "indices must have shape [b, s_q, topk] = [3, 2, *], got [2, 2, 64]"),
    ("indices", lambda t: t.long(), "indices must be torch.int32, got torch.int64"),
    ("indices", lambda t: t.to("meta"), "indices must be on q's device"),
    ("indices", lambda t: t.mT.contiguous().mT, "indices must have contiguous lists"),
    ("topk_length", lambda t: t[:2], "topk_length must have shape [3, 2] or [3], got [2, 2]"),
    ("topk_length", lambda t: t.long(), "topk_length must be torch.int32, got torch.int64"),
    ("block_table", lambda t: t[:2], "block_table must have shape [b, max_pages] = [3, *], got [2,"),
    ("block_table", lambda t: t.long(), "block_table must be torch.int32, got torch.int64"),
    ("block_table", lambda t: t.T.contiguous().T, "block_table must have contiguous rows"),
    ("attn_sink", lambda t: t[:3], "attn_sink must have shape [h_q] = [4], got [3]"),
    ("attn_sink", lambda t: t.double(), "attn_sink must be torch.float32, got torch.float64"),
    ("k_scale", lambda t: t.repeat(2), "k_scale must be one float32"),
    ("out", lambda t: t[:2], "out must have shape [b, s_q, h_q, 512] = [3, 2, 4, 512], got [2, 2, 4, 512]"),
    ("out", lambda t: t.mT.contiguous().mT, "out must be contiguous"),
    ("lse", lambda t: t.double(), "lse must be torch.float32, got torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), DECODE_ERRORS)
def test_wrong_arguments_are_named(name, change, message, device):
    problem = make_sparse_problem([40, 0, 200], h_q=4, s_q=2, topk=64, device=device)
    arguments = dict(zip(("q", "cache", "indices"), problem.arguments(), strict=True))
    arguments |= {
        "topk_length": torch.full((3, 2), 64, dtype=torch.int32, device=device),
        "block_table": problem.block_table,
        "attn_sink": sink_of(4, device),
        "k_scale": torch.ones(1, device=device),
        "out": torch.empty(3, 2, 4, 512, dtype=problem.q.dtype, device=device),
        "lse": torch.empty(3, 2, 4, device=device),
    }
    ops.mla_sparse_decode(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.mla_sparse_decode(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda t: t[0], "q must have shape [s, h_q, 576], got [6, 576]"),
        ("kv", lambda t: t.repeat(1, 2, 1), "kv must have shape [s_kv, 1, 576] or [s_kv, 576], got ["),
        ("kv", lambda t: t[..., :512], "cache must be one of"),
        ("kv", lambda t: spread_by_8(t), "kv must have a row stride that is a multiple of 16 elements, got 584"),
        ("indices", lambda t: t[:, 0], "indices must have shape [s_q, 1, topk], got [6, 128]"),
        ("indices", lambda t: t[:4], "indices must have shape [s, topk] = [6, *], got [4, 128]"),
        ("topk_length", lambda t: t[:4], "topk_length must have shape [6], got [4]"),
        ("attn_sink", lambda t: t.repeat_interleave(2)[::2], "attn_sink must be contiguous, got strides [2]"),
        ("out", lambda t: t.float(), "out must be torch.bfloat16, got torch.float32"),
        ("d_v", lambda t: 256, "d_v must be 512, got 256"),
    ],
)
def test_wrong_arguments_of_flash_mla_sparse_fwd_are_named(name, change, message, device):
    _, q, kv, indices = prefill_problem("bf16", device)
    arguments = {
        "q": q,
        "kv": kv.unsqueeze(1),
        "indices": indices.unsqueeze(1),
        "sm_scale": 0.04,
        "d_v": 512,
        "topk_length": torch.full((6,), 100, dtype=torch.int32, device=device),
        "attn_sink": sink_of(6, device),
        "out": torch.empty(6, 6, 512, dtype=q.dtype, device=device),
    }
    ops.flash_mla_sparse_fwd(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.flash_mla_sparse_fwd(**arguments)


@pytest.mark.gpu
def test_dtypes_that_no_kernel_mixes_are_refused(device):
    problem = make_sparse_problem([30], h_q=4, topk=64, cache_format="fp8_ds_mla", device=device)
    q, cache, indices = problem.arguments()
    with pytest.raises(ValueError, match="q must be torch.bfloat16 for an fp8_ds_mla cache"):
        ops.mla_sparse_decode(q.half(), cache, indices)
    with pytest.raises(ValueError, match="cache must be fp8 or have q's dtype torch.bfloat16, got torch.float16"):
        ops.mla_sparse_decode(q, torch.zeros(2, 64, 576, dtype=torch.float16, device=device), indices)


def test_an_empty_batch(device):
    problem = make_sparse_problem([5], h_q=4, topk=64, device=device, slots=True)
    q, cache, indices = problem.arguments()
    out, lse = ops.mla_sparse_decode(q[:0], cache, indices[:0])
    assert out.shape == (0, 1, 4, 512) and lse.shape == (0, 1, 4)
    results = ops.flash_mla_sparse_fwd(q[:0, 0], cache.flatten(0, 1), indices[:0], 0.1)
    assert [r.shape for r in results] == [(0, 4, 512), (0, 4), (0, 4)]
