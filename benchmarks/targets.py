# SPDX-License-Identifier: Apache-2.0
"""What this project aims at on an H200: the best peer's time over ours in the same run, and some absolute figures."""

_DENSE = {
    # case | bf16, fp8
    **{f"b128 h{h} kv8192": (1.05, 1.35) for h in (16, 32)},
    "b128 h64 kv8192": (1.1, 1.3),
    "b32 h16 kv4096": (1.3, 1.5),
    "b64 s_q2 h16 kv4096": (1.3, 1.5),
    "b1 h16 kv131072": (1.6, 1.6),
    "b1 h128 kv131072": (1.5, 1.5),
    **{f"b{b} h16 kv{kv}": (1.8, 1.6) for b in (1, 4, 8) for kv in (1024, 2048, 4096, 8192)},
    "b1 h128 kv8192": (1.5, 1.5),
    **{f"b128 h128 kv{kv}": (1.05, 1.3) for kv in (4096, 8192)},
    "b128 s_q2 h128 kv4096": (1.05, 1.3),
    "b64 h16 ragged256-65536": (1.2, 1.3),
    "b64 h128 ragged256-65536": (1.2, 1.3),
}
_SPARSE = {
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
DENSE = tuple(_DENSE)
SPARSE = tuple(_SPARSE)
"""Names of the cases of dense and of sparse attention."""
RATIOS = {
    (case, dtype): ratio
    for dtypes, table in ((("bf16", "fp8"), _DENSE), (("fp8_ds_mla", "bf16"), _SPARSE))
    for case, ratios in table.items()
    for dtype, ratio in zip(dtypes, ratios, strict=True)
} | {(case, "indexer"): 1.0 for case in _INDEXER}
"""Ratio of each case and dtype of the cache."""
ABSOLUTE = {
    **{(f"b128 h{h} kv8192", "bf16"): ("gbs", 4200.0) for h in (16, 32)},
    ("b128 h16 kv8192", "fp8"): ("gbs", 4000.0),
    **{
        (case, dtype): ("tflops", rate)
        for case in ("b128 h128 kv4096", "b128 h128 kv8192", "b128 s_q2 h128 kv4096")
        for dtype, rate in (("bf16", 570.0), ("fp8", 850.0))
    },
    **{
        (f"b{b} h16 kv{kv}", "bf16"): ("median_us", most) for b in (1, 4, 8) for kv, most in ((1024, 9.0), (8192, 13.0))
    },
    ("b128 h128 topk2048", "fp8_ds_mla"): ("tflops", 480.0),
    ("b128 h64 topk2048", "fp8_ds_mla"): ("median_us", 75.0),
    **{(f"b128 h{h} topk2048", "fp8_ds_mla"): ("median_us", 60.0) for h in (8, 16)},
    **{(f"b8 h{h} topk2048", "fp8_ds_mla"): ("median_us", 13.0) for h in (16, 64)},
    **{(f"b1 h{h} topk2048", "fp8_ds_mla"): ("median_us", 13.0) for h in (16, 32, 64, 128)},
}
"""Field of a saved row that is to reach a figure: rates at least, times at most."""
