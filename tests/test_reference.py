# SPDX-License-Identifier: Apache-2.0
"""The reference against attention written out by hand, request by request, in float64."""

import math
import random

import pytest
import torch
from problems import make_problem, random_lengths

from vllm_fusedmla.kernels import layout, reference


def by_hand(problem, causal: bool):
    q, cache, table, lens = problem.arguments()
    b, s_q, h_q, _ = q.shape
    rows = layout.read_cache(cache, problem.k_scale, torch.float64)
    out = torch.zeros(b, s_q, h_q, 512, dtype=torch.float64)
    lse = torch.full((b, s_q, h_q), -math.inf, dtype=torch.float64)
    for i in range(b):
        keys = [rows[table[i, t // cache.shape[1]], t % cache.shape[1]] for t in range(int(lens[i]))]
        for j in range(s_q):
            seen = len(keys) - s_q + 1 + j if causal else len(keys)
            if seen <= 0:
                continue
            k = torch.stack(keys[:seen])
            for h in range(h_q):
                score = k @ q[i, j, h].double() * 576**-0.5
                weight = torch.softmax(score, 0)
                out[i, j, h] = weight @ k[:, :512]
                lse[i, j, h] = torch.logsumexp(score, 0)
    return out, lse


@pytest.mark.parametrize("cache_format", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("causal", [True, False])
def test_against_attention_by_hand(cache_format, causal):
    lengths = [0, 1, 2, *random_lengths(2, 70)]
    problem = make_problem(lengths, h_q=3, s_q=random.choice([1, 3]), page_size=16, cache_format=cache_format)
    out, lse = problem.expected(causal=causal)
    want, want_lse = by_hand(problem, causal)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-9, atol=1e-12)


def test_query_in_two_parts_and_given_outputs():
    problem = make_problem([40, 7], h_q=4, page_size=16)
    q, *rest = problem.arguments()
    want, want_lse = reference.mla_decode(q, *rest)
    out, lse = torch.empty_like(want), torch.empty_like(want_lse)
    wide = torch.randn(4, 2, 1, 700).to(q.dtype)  # a transposed view, as vLLM's absorbed query is
    wide[..., :512] = q[..., :512].permute(2, 0, 1, 3)
    nope = wide[..., :512].permute(1, 2, 0, 3)
    result = reference.mla_decode((nope, q[..., 512:]), *rest, out=out, lse=lse)
    assert result[0] is out and result[1] is lse
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_a_large_batch_is_taken_in_chunks(monkeypatch):
    problem = make_problem(random_lengths(6, 60), h_q=2, page_size=16)
    whole = problem.expected()
    monkeypatch.setattr(reference, "_MAX_GATHERED_VALUES", 1)
    for got, want in zip(problem.expected(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_an_empty_batch_and_empty_requests():
    problem = make_problem([0, 0], h_q=2)
    out, lse = problem.expected()
    assert (out == 0).all() and (lse == -math.inf).all()
    q, cache, table, lens = problem.arguments()
    out, lse = reference.mla_decode(q[:0], cache, table[:0], lens[:0])
    assert out.shape == (0, 1, 2, 512) and lse.shape == (0, 1, 2)
