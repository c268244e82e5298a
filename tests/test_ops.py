# SPDX-License-Identifier: Apache-2.0
"""The public API: the operator, FlashMLA's two functions, and what they say about wrong arguments."""

import re

import pytest
import torch
from problems import FORMATS, assert_matches, make_problem, random_lengths

from vllm_fusedmla import ops


@pytest.fixture
def problem(device):
    return make_problem([40, 0, 200], h_q=4, s_q=2, device=device)


def run(function, problem, **options):
    return function(*problem.arguments(), k_scale=problem.k_scale, **options)


def test_mla_decode_computes_attention(problem, device):
    out, lse = run(ops.mla_decode, problem)
    assert out.dtype == problem.q.dtype and out.shape == (3, 2, 4, 512) and lse.shape == (3, 2, 4)
    assert_matches(problem, out, lse)


def test_operator_registration_is_sound(problem):
    q, cache, table, lens = problem.arguments()
    out, lse = torch.empty(3, 2, 4, 512, dtype=q.dtype, device=q.device), torch.empty(3, 2, 4, device=q.device)
    arguments = (q, cache, table, lens, out, lse, None, 1.0, None, True, False, False, 4096, None, None, None)
    # A poisoned cache is no input for a check that compares numbers: NaN differs from NaN.
    arguments = (q, torch.zeros_like(cache), *arguments[2:])
    torch.library.opcheck(torch.ops.fusedmla.mla_decode.default, arguments)


def test_torch_compile_keeps_it_in_the_graph(problem):
    def step(q, cache, table, lens):
        out, lse = ops.mla_decode(q, cache, table, lens)
        return out * 2, lse

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(*problem.arguments()), step(*problem.arguments()), strict=True):
        torch.testing.assert_close(got, want)


def test_flash_mla_functions(device):
    problem = make_problem([40, 0, 200], h_q=4, device=device)
    q, cache, table, lens = problem.arguments()
    want, want_lse = ops.mla_decode(q, cache, table, lens, causal=False)
    newer = ops.get_mla_metadata()
    older = ops.get_mla_metadata(lens, 4, 1)
    assert isinstance(older[0], torch.Tensor) and isinstance(older[1], torch.Tensor)
    assert older[0].dtype == older[1].dtype == torch.int32 and older[0].shape[1] == 8 and older[1].shape == (4,)
    for given in [newer, newer, older, (None, None)]:
        out, lse = ops.flash_mla_with_kvcache(q, cache.unsqueeze(2), table, lens, 512, *given)
        assert torch.equal(out, want)
        assert lse.shape == (3, 4, 1)
        assert (lse[1] == torch.inf).all()  # FlashMLA's sign for a row without keys
        assert torch.equal(lse[0], want_lse[0].transpose(0, 1))


def test_flash_mla_takes_quantised_queries(device):
    problem = make_problem([30, 90], h_q=4, cache_format="fp8", device=device)
    q, cache, table, lens = problem.arguments()
    scale = torch.tensor(0.25, device=device)
    q8 = (q.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    problem.q = (q8.float() * scale).to(torch.bfloat16)
    out, lse = ops.flash_mla_with_kvcache(
        q8, cache.unsqueeze(2), table, lens, descale_q=scale, descale_k=problem.k_scale, causal=True
    )
    assert_matches(problem, out, lse.transpose(1, 2))


def test_flash_mla_in_batch_invariant_mode(problem):
    q, cache, table, lens = problem.arguments()
    want, want_lse = run(ops.mla_decode, problem, batch_invariant=True)
    meta = ops.get_mla_metadata()[0]
    for _ in range(2):
        out, lse = ops.flash_mla_with_kvcache(
            q, cache.unsqueeze(2), table, lens, 512, meta, causal=True, enable_batch_invariant=True
        )
        assert torch.equal(out, want) and torch.equal(lse[::2].transpose(1, 2), want_lse[::2])
    older = ops.get_mla_metadata(lens, 8, 1)
    with pytest.raises(ValueError, match="schedule must come from decode_schedule"):
        ops.flash_mla_with_kvcache(q, cache.unsqueeze(2), table, lens, 512, *older, enable_batch_invariant=True)


def test_flash_mla_reads_rows_with_their_own_scales(device):
    problem = make_problem([30, 90], h_q=4, cache_format="fp8_ds_mla", device=device)
    q, cache, table, lens = problem.arguments()
    meta = ops.get_mla_metadata()[0]
    for _ in range(2):
        out, lse = ops.flash_mla_with_kvcache(
            q, cache.unsqueeze(2), table, lens, tile_scheduler_metadata=meta, causal=True, is_fp8_kvcache=True
        )
        assert_matches(problem, out, lse.transpose(1, 2))
    of_other_format = ops.get_mla_metadata(lens, 4, 1, is_fp8_kvcache=True)
    with pytest.raises(ValueError, match=re.escape("must come from get_mla_metadata()")):
        ops.flash_mla_with_kvcache(q, cache.unsqueeze(2), table, lens, 512, *of_other_format)


@pytest.mark.gpu
def test_a_float16_query_beside_a_bfloat16_rope_part_is_refused(device):
    problem = make_problem([30], h_q=4, cache_format="fp8_ds_mla", device=device)
    with pytest.raises(ValueError, match="q must be torch.bfloat16 for an fp8_ds_mla cache"):
        ops.mla_decode(problem.q.half(), *problem.arguments()[1:])


def broken(problem, **changes):
    arguments = dict(zip(("q", "cache", "block_table", "seq_lens"), problem.arguments(), strict=True))
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    return arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": lambda t: t[0]}, "q must have shape [b, s_q, h_q, 576], got [2, 4, 576]"),
        ({"q": lambda t: t[..., :512]}, "q must have shape [b, s_q, h_q, 576], got [3, 2, 4, 512]"),
        ({"q": lambda t: t.repeat(1, 5, 1, 1)}, "q must have 1 <= s_q <= 8, got s_q = 10"),
        ({"q": lambda t: t.repeat(1, 1, 33, 1)}, "q must have 1 <= h_q <= 128, got h_q = 132"),
        ({"q": lambda t: t.to(torch.int8)}, "got torch.int8"),
        ({"cache": lambda t: t[..., :320]}, "cache must be one of"),
        ({"cache": lambda t: t[:, :8]}, "page_size that is a multiple of 16, got 8"),
        ({"cache": lambda t: t.to("meta")}, "cache must be on q's device"),
        ({"block_table": lambda t: t[:2]}, "block_table must have shape [b, max_pages] = [3, *], got [2,"),
        ({"block_table": lambda t: t.long()}, "block_table must be torch.int32, got torch.int64"),
        ({"block_table": lambda t: t.T.contiguous().T}, "block_table must have contiguous rows"),
        ({"seq_lens": lambda t: t[:2]}, "seq_lens must have shape [b] = [3], got [2]"),
        ({"seq_lens": lambda t: t.long()}, "seq_lens must be torch.int32, got torch.int64"),
        ({"seq_lens": lambda t: t.repeat_interleave(2)[::2]}, "seq_lens must be contiguous, got stride 2"),
    ],
)
def test_wrong_arguments_are_named(problem, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.mla_decode(**broken(problem, **changes))


def test_wrong_outputs_and_scales_are_named(problem):
    wrong = torch.empty(3, 2, 4, 576, dtype=problem.q.dtype, device=problem.q.device)
    with pytest.raises(ValueError, match=re.escape("out must have shape [b, s_q, h_q, 512] = [3, 2, 4, 512], got")):
        ops.mla_decode(*problem.arguments(), out=wrong)
    with pytest.raises(ValueError, match="out must be contiguous"):
        ops.mla_decode(*problem.arguments(), out=wrong[..., :512])
    with pytest.raises(ValueError, match="k_scale must be one float32"):
        ops.mla_decode(*problem.arguments(), k_scale=torch.ones(2, device=problem.q.device))


def test_a_schedule_of_another_launch_is_refused(problem):
    q, cache, table, lens = problem.arguments()
    shared = ops.decode_schedule(lens, 2, 4, cache)
    want, want_lse = ops.mla_decode(q, cache, table, lens)
    out, lse = ops.mla_decode(q, cache, table, lens, schedule=shared)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    for other in (ops.decode_schedule(lens[:2], 2, 4, cache), ops.decode_schedule(lens, 8, 128, cache)):
        with pytest.raises(ValueError, match="schedule must come from decode_schedule with this batch size"):
            ops.mla_decode(q, cache, table, lens, schedule=other)
    with pytest.raises(ValueError, match="schedule must come from decode_schedule"):
        ops.mla_decode(q, cache, table, lens, schedule=shared, batch_invariant=True)


def test_flash_mla_refuses_what_it_does_not_have(problem):
    q, cache, table, lens = problem.arguments()
    with pytest.raises(ValueError, match=re.escape("[num_blocks, page_block_size, 1, 576]")):
        ops.flash_mla_with_kvcache(q, cache, table, lens)
    with pytest.raises(ValueError, match="head_dim_v must be 512, got 256"):
        ops.flash_mla_with_kvcache(q, cache.unsqueeze(2), table, lens, 256)
    with pytest.raises(NotImplementedError, match="DeepSeek-V4"):
        ops.flash_mla_with_kvcache(q, cache.unsqueeze(2), table, lens, extra_k_cache=cache.unsqueeze(2))
    with pytest.raises(ValueError, match="attn_sink and topk_length must be None without indices"):
        ops.flash_mla_with_kvcache(q, cache.unsqueeze(2), table, lens, topk_length=lens)
    with pytest.raises(ValueError, match="block_table and cache_seqlens must be given without indices"):
        ops.flash_mla_with_kvcache(q, cache.unsqueeze(2), None, None)
    with pytest.raises(ValueError, match="num_heads_k must be 1 for MLA, got 2"):
        ops.get_mla_metadata(lens, 8, 2)
    with pytest.raises(ValueError, match="num_q_tokens_per_head_k must be"):
        ops.get_mla_metadata(lens)
    with pytest.raises(ValueError, match="cache_seqlens must be contiguous"):
        ops.get_mla_metadata(lens.repeat_interleave(2)[::2], 8, 1)


def test_random_problems_through_the_public_api(device):
    for cache_format in FORMATS:
        problem = make_problem(random_lengths(3, 150), h_q=5, page_size=32, cache_format=cache_format, device=device)
        assert_matches(problem, *run(ops.mla_decode, problem))
