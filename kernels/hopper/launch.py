# SPDX-License-Identifier: Apache-2.0
"""Loading and launching the compiled kernels through the CUDA driver, without a compiler or torch's C++ interface."""

import ctypes
from functools import cache, lru_cache

import torch
from cuda.bindings import driver

from . import CUBINS
from .variants import VARIANTS

_SHARED_BYTES = 227 * 1024  # all that a block may have: one block a multiprocessor
_COUNTERS = 1 << 16


class Schedule(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in ("b", "programs", "fixed_tiles", "min_tiles", "min_share", "batch_invariant", "max_splits")
    ]


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("b", "s", "h")]


TensorMap = ctypes.c_uint8 * 128


class Params(ctypes.Structure):
    """Mirror of `Params` in params.cuh; the device's copy is padded to a multiple of 64 bytes."""

    _fields_ = [
        *((name, TensorMap) for name in ("latent", "rope", "scales")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "q_nope", "q_rope", "block_table", "seq_lens", "out", "lse", "partial_out", "partial_lse", "arrivals",
                "k_scale",
            )
        ),
        ("q_nope_stride", Strides),
        ("q_rope_stride", Strides),
        ("table_stride", ctypes.c_int64),
        ("schedule", Schedule),
        ("k_scale_value", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("s_q", "h_q", "causal", "page_size", "q_is_fp16")),
        ("padding", ctypes.c_uint8 * 64),
    ]  # fmt: skip


def check(result: tuple) -> object:
    """The value of a driver call, or its error as an exception."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(error)
        raise RuntimeError(f"CUDA driver: {name.decode() if name else error}")
    return values[0] if values else None


@cache
def _kernel(name: str, device: int) -> object:
    code = (CUBINS / f"{name}.cubin").read_bytes()
    library = check(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
    kernel = check(driver.cuLibraryGetKernel(library, name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(driver.cuKernelSetAttribute(attribute, _SHARED_BYTES, kernel, driver.CUdevice(device)))
    return driver.CUfunction(int(kernel))


@cache
def _counter_pool(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def counters(count: int, device: torch.device) -> torch.Tensor:
    """Zeros that a launch counts arrivals in and leaves at zero; launches of a stream, one after the other, share them.

    Raises:
        ValueError: more than 65536 blocks of query rows in a batch.
    """
    if count > _COUNTERS:
        raise ValueError(f"a batch may have up to {_COUNTERS} blocks of query rows, got {count}")
    return _counter_pool(device, torch.cuda.current_stream(device).cuda_stream)


def launch(name: str, params: Params, grid: tuple[int, int], cluster: int = 1) -> None:
    """Launch a kernel on torch's current stream; it may start while the kernel before it ends (and waits for it)."""
    function = _kernel(name, torch.cuda.current_device())
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = VARIANTS[name].threads, 1, 1
    config.sharedMemBytes = _SHARED_BYTES
    config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
    overlap = driver.CUlaunchAttribute()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    attributes = [overlap]
    if cluster > 1:
        shape = driver.CUlaunchAttribute()
        shape.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        shape.value.clusterDim.x, shape.value.clusterDim.y, shape.value.clusterDim.z = cluster, 1, 1
        attributes.append(shape)
    config.attrs, config.numAttrs = attributes, len(attributes)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))


_SWIZZLE = {
    0: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
    64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
    128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
}


@lru_cache(maxsize=4096)
def tensor_map(
    address: int,
    element_bytes: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> bytes:
    """An encoded TMA descriptor.

    Args:
        address: of the first element, a multiple of 16.
        element_bytes: 1 or 2.
        shape: elements of each dimension, innermost first.
        strides: bytes between elements of every dimension but the innermost, multiples of 16.
        box: elements of a copy in each dimension.
        swizzle: 0, 64 or 128 bytes.
    """
    types = driver.CUtensorMapDataType
    small, wide = driver.cuuint32_t, driver.cuuint64_t
    encoded = check(
        driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_UINT8 if element_bytes == 1 else types.CU_TENSOR_MAP_DATA_TYPE_UINT16,
            len(shape),
            address,
            [wide(n) for n in shape],
            [wide(n) for n in strides],
            [small(n) for n in box],
            [small(1)] * len(shape),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            _SWIZZLE[swizzle],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(encoded.getPtr(), 128)
