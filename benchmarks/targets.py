# SPDX-License-Identifier: Apache-2.0
"""Aims in sparse attention and its indexer: the best peer's time over ours, on an H200, in the same run."""

_RATIOS = {
    # case | fp8_ds_mla, bf16
    "b128 h128 topk2048": (1.4, 1.1),
    "b128 s_q2 h128 topk2048": (1.4, 1.1),
    "b128 h64 topk2048": (1.6, 1.2),
    "b128 h16 topk2048": (2.0, 1.1),
    "b128 h8 topk2048": (2.0, 1.1),
    "b8 h64 topk2048": (2.0, 1.7),
    "b8 h16 topk2048": (2.0, 1.7),
    "b1 h128 topk2048": (1.8, 1.5),
    "b1 h64 topk2048": (1.8, 1.5),
    "b1 h32 topk2048": (1.8, 1.5),
    "b1 h16 topk2048": (1.8, 1.5),
    "prefill s4096 h128 topk2048": (1.2, 1.1),
    "prefill s4096 h64 topk2048": (1.3, 1.1),
    "prefill s4096 h16 topk2048": (2.5, 2.5),
}
_INDEXER = ("paged b128 kv32768", "paged b1 kv131072", *(f"topk2048 b{b} kv131072" for b in (1, 8, 32)))
SPARSE = tuple(_RATIOS)
"""Names of the cases of sparse attention."""
RATIOS = {
    (case, dtype): ratio
    for case, ratios in _RATIOS.items()
    for dtype, ratio in zip(("fp8_ds_mla", "bf16"), ratios, strict=True)
} | {(case, "indexer"): 1.0 for case in _INDEXER}
"""Ratio of each case and dtype of the cache."""
