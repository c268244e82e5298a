# SPDX-License-Identifier: Apache-2.0
"""The kernels' parameter as ctypes: a mirror of params.cuh, field by field. Any machine can check it."""

import ctypes


class Schedule(ctypes.Structure):
    """What a kernel's own scheduler needs besides the sequence lengths."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "b",
            "programs",
            "fixed_tiles",
            "min_tiles",
            "min_share",
            "batch_invariant",
            "max_splits",
            "length",
        )
    ]


class Strides(ctypes.Structure):
    """Of a query's batch, token and head dimension, in elements."""

    _fields_ = [(name, ctypes.c_int64) for name in ("b", "s", "h")]


TensorMap = ctypes.c_uint8 * 128


class Params(ctypes.Structure):
    """Mirror of `Params` in params.cuh; the device's copy is padded to a multiple of 64 bytes."""

    _fields_ = [
        *((name, TensorMap) for name in ("latent", "rope", "scales")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "q_nope", "q_rope", "cache", "indices", "block_table", "seq_lens", "out", "lse", "partial_out",
                "partial_lse", "arrivals", "k_scale",
            )
        ),
        ("q_nope_stride", Strides),
        ("q_rope_stride", Strides),
        ("page_stride", ctypes.c_int64),
        ("index_stride", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("schedule", Schedule),
        ("k_scale_value", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        *(
            (name, ctypes.c_int)
            for name in ("s_q", "h_q", "causal", "page_size", "q_is_fp16", "num_pages", "max_pages", "sharers")
        ),
        ("max_logits", ctypes.c_void_p),
        ("padding", ctypes.c_uint8 * 64),
    ]  # fmt: skip
