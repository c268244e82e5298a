# SPDX-License-Identifier: Apache-2.0
"""Which sparse kernel serves a launch where that depends on how many query tokens it has."""

import pytest
import torch

from vllm_fusedmla.kernels import select, sparse_plan

HOPPER = (9, 0)
FORMATS = ("bf16", "fp16", "fp8_ds_mla")


def chosen(h_q, cache_format, tokens):
    config = select.select_sparse(HOPPER, h_q, cache_format, True, tokens)
    return config.kernel, config.block_h


@pytest.mark.parametrize(
    ("h_q", "cache_format", "most", "otherwise"),
    [
        (16, "fp8_ds_mla", 8, ("swapab_gather", 16)),
        (20, "fp8_ds_mla", 2, ("swapab_gather", 24)),
        (64, "fp8_ds_mla", 8, ("twowg_gather", 64)),
        (128, "fp8_ds_mla", 4, ("twowg_gather", 64)),
        (32, "bf16", 8, ("twowg_gather", 64)),
        (32, "fp8_ds_mla", 8, ("swapab_gather", 32)),
        (64, "fp16", 4, ("twowg_gather", 64)),
        (128, "bf16", 2, ("twowg_gather", 64)),
    ],
)
def test_few_tokens_are_taken_in_blocks_of_16_heads(h_q, cache_format, most, otherwise):
    few = ("swapab_gather", 16)
    assert [chosen(h_q, cache_format, n) for n in range(1, 10)] == [few] * most + [otherwise] * (9 - most)
    assert chosen(h_q, cache_format, None) == otherwise


def test_prefill_of_some_heads_is_the_portable_kernels():
    for cache_format in FORMATS:
        for h_q in (8, 9, 12, 16, 17, 128):
            config = select.select_sparse(HOPPER, h_q, cache_format, True, prefill=True)
            assert (config.kernel == "triton") == (cache_format != "fp8_ds_mla" and 9 <= h_q <= 16)


def test_the_choice_depends_on_no_more_than_few_tokens():
    for cache_format in FORMATS:
        for h_q in range(1, select.MAX_H_Q + 1):
            assert chosen(h_q, cache_format, select.FEW_TOKENS + 1) == chosen(h_q, cache_format, None)


@pytest.mark.parametrize("options", [{"batch_invariant": True}, {"prefill": True}])
def test_some_launches_must_not_look_at_it(options, monkeypatch):
    asked = []
    monkeypatch.setattr(sparse_plan, "_sparse_plan", lambda *arguments: asked.append(arguments[-1]))
    for tokens in (1, select.FEW_TOKENS, select.FEW_TOKENS + 1, None):
        sparse_plan.sparse_plan(64, "fp8_ds_mla", torch.device("cpu"), tokens=tokens)
        sparse_plan.sparse_plan(64, "fp8_ds_mla", torch.device("cpu"), tokens=tokens, **options)
    assert asked == [1, None, select.FEW_TOKENS, None, None, None, None, None]
