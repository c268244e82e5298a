# SPDX-License-Identifier: Apache-2.0
"""The sparse reference against attention written out by hand, list by list, in float64."""

import math
import random

import pytest
import torch
from problems import FORMATS, random_lengths
from sparse_problems import make_sparse_problem

from vllm_fusedmla.kernels import layout, reference, sparse_reference


def by_hand(problem):
    """out, max_logits and lse, from Python lists of the keys that each list names."""
    b, s_q, h_q, _ = problem.q.shape
    rows = layout.read_cache(problem.cache, problem.k_scale, torch.float64)
    num_pages, page_size = rows.shape[:2]
    counts = problem.options.get("topk_length")
    sink = problem.options.get("attn_sink")
    out = torch.zeros(b, s_q, h_q, 512, dtype=torch.float64)
    lse = torch.full((b, s_q, h_q), -math.inf, dtype=torch.float64)
    largest = lse.clone()
    for i in range(b):
        for j in range(s_q):
            entries = problem.indices[i, j].tolist()
            if counts is not None:
                entries = entries[: int(counts[i] if counts.dim() == 1 else counts[i, j])]
            keys = []
            for entry in entries:
                if entry < 0 or (not problem.slots and entry // page_size >= problem.block_table.shape[1]):
                    continue
                page = entry // page_size if problem.slots else int(problem.block_table[i, entry // page_size])
                if page < num_pages:
                    keys.append(rows[page, entry % page_size])
            if not keys:
                continue
            k = torch.stack(keys)
            for h in range(h_q):
                score = k @ problem.q[i, j, h].double() * 576**-0.5
                weight = torch.exp(score)
                total = weight.sum() + (torch.exp(sink[h].double()) if sink is not None else 0.0)
                out[i, j, h] = weight @ k[:, :512] / total
                lse[i, j, h] = weight.sum().log()
                largest[i, j, h] = score.max()
    return out, largest, lse


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
def test_against_attention_by_hand(cache_format, slots, lengths):
    problem = make_sparse_problem(
        [0, 1, *random_lengths(2, 150)], h_q=3, s_q=random.choice([1, 3]), topk=random.choice([40, 64, 128]),
        page_size=16, cache_format=cache_format, slots=slots, lengths=lengths, sink=random.random() < 0.5,
    )  # fmt: skip
    out, lse = problem.expected()
    want, _, want_lse = by_hand(problem)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cache_format", ["bf16", "fp8_ds_mla"])
@pytest.mark.parametrize("lengths", [False, True])
def test_prefill_is_the_same_without_batch_and_pages(cache_format, lengths):
    problem = make_sparse_problem(
        [70, 9, 0, 200], h_q=2, topk=64, page_size=16, cache_format=cache_format, slots=True, lengths=lengths, sink=True
    )
    results = sparse_reference.mla_sparse_prefill(
        problem.q[:, 0].double(), problem.cache.flatten(0, 1), problem.indices[:, 0], **problem.options,
        compute_dtype=torch.float64,
    )  # fmt: skip
    for got, want in zip(results, by_hand(problem), strict=True):
        torch.testing.assert_close(got, want[:, 0], rtol=1e-9, atol=1e-12)


def test_a_list_of_all_keys_is_dense_attention():
    lengths = [90, 33]
    problem = make_sparse_problem(lengths, h_q=2, topk=128, page_size=16)
    every = torch.full((2, 1, 128), -1, dtype=torch.int32)
    for i, n in enumerate(lengths):
        every[i, 0, torch.randperm(128)[:n]] = torch.randperm(n).int()
    cache = torch.randn_like(problem.cache)
    out, lse = sparse_reference.mla_sparse_decode(problem.q, cache, every, block_table=problem.block_table)
    want, want_lse = reference.mla_decode(problem.q, cache, problem.block_table, problem.seq_lens)
    torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_query_of_any_dtype_in_two_parts_and_given_outputs(dtype):
    problem = make_sparse_problem([60, 8], h_q=4, topk=32, page_size=16)
    q = problem.q.to(dtype)
    want, want_lse = sparse_reference.mla_sparse_decode(q, problem.cache, problem.indices, **problem.keywords())
    assert want.dtype == dtype and want_lse.dtype == torch.float32
    out, lse = torch.empty_like(want), torch.empty_like(want_lse)
    parts = (q[..., :512].transpose(0, 2).contiguous().transpose(0, 2), q[..., 512:])
    result = sparse_reference.mla_sparse_decode(
        parts, problem.cache, problem.indices, out=out, lse=lse, **problem.keywords()
    )
    assert result[0] is out and result[1] is lse
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_many_tokens_are_taken_in_chunks(monkeypatch):
    problem = make_sparse_problem(random_lengths(5, 90), h_q=2, s_q=2, topk=64, page_size=16, lengths=True, sink=True)
    whole = problem.expected()
    monkeypatch.setattr(sparse_reference, "_MAX_GATHERED_VALUES", 1)
    for got, want in zip(problem.expected(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_sinks_that_take_nothing_and_everything():
    problem = make_sparse_problem([50, 0], h_q=3, topk=64, page_size=16)
    want, want_lse = problem.expected()
    sink = torch.tensor([-math.inf, math.inf, 0.0])
    out, lse = problem.expected(attn_sink=sink)
    assert torch.equal(lse, want_lse)
    assert torch.equal(out[:, :, 0], want[:, :, 0]) and (out[:, :, 1] == 0).all() and (out[1] == 0).all()
    assert torch.isfinite(out).all() and (out[0, 0, 2].abs() < want[0, 0, 2].abs()).all()


def test_nothing_to_attend_to():
    problem = make_sparse_problem([40], h_q=2, topk=64, page_size=16)
    q, cache, indices = problem.arguments()
    for changes in (
        {"indices": torch.full_like(indices, -1)},
        {"topk_length": torch.zeros(1, dtype=torch.int32)},
        {"indices": indices[..., :0]},
        {"cache": cache[:0], "block_table": None},
        {"block_table": problem.block_table[:, :0]},
    ):
        options = {"cache": cache, "indices": indices, **problem.keywords(), **changes}
        out, lse = sparse_reference.mla_sparse_decode(q, options.pop("cache"), options.pop("indices"), **options)
        assert (out == 0).all() and (lse == -math.inf).all()
    out, lse = sparse_reference.mla_sparse_decode(q[:0], cache, indices[:0])
    assert out.shape == (0, 1, 2, 512) and lse.shape == (0, 1, 2)
