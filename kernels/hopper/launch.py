# SPDX-License-Identifier: Apache-2.0
"""Loading and launching the compiled kernels through the CUDA driver, without a compiler or torch's C++ interface."""

import ctypes
from functools import cache, lru_cache
from typing import Any

import torch
from cuda.bindings import driver

from . import CUBINS, DriverError
from .counters import CounterPool
from .variants import VARIANTS

_RELAXED = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
_SHARED_BYTES = 227 * 1024  # all that a block may have: one block a multiprocessor


def check(result: tuple) -> Any:
    """The value of a driver call, or its error as an exception."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(error)
        raise DriverError(f"CUDA driver: {name.decode() if name else error}")
    return values[0] if values else None


@cache
def _kernel(name: str, device: int) -> object:
    if not int(check(driver.cuCtxGetCurrent())):
        torch.cuda.mem_get_info(device)  # a thread's first call of CUDA's runtime makes a context current
    previous = check(driver.cuThreadExchangeStreamCaptureMode(_RELAXED))  # loading is no work to be captured
    try:
        return _load(name, device)
    finally:
        check(driver.cuThreadExchangeStreamCaptureMode(previous))


def _load(name: str, device: int) -> object:
    code = (CUBINS / f"{name}.cubin").read_bytes()
    library = check(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
    kernel = check(driver.cuLibraryGetKernel(library, name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(driver.cuKernelSetAttribute(attribute, _SHARED_BYTES, kernel, driver.CUdevice(device)))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    check(driver.cuKernelSetAttribute(attribute, 1, kernel, driver.CUdevice(device)))  # up to 16, not 8
    check(driver.cuKernelGetFunction(kernel))  # into the device's memory now, not in the first launch
    return driver.CUfunction(int(kernel))


def load(name: str, device: torch.device) -> None:
    """Make a kernel ready on a device, so that launches neither load nor allocate.

    Raises:
        DriverError: the driver does not take the cubin.
        OSError: there is no such cubin.
    """
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        if not torch.cuda.is_current_stream_capturing() and not counter_pool(index).chunks:
            counter_pool(index).reserve()
        _kernel(name, index)


@cache
def counter_pool(device: int) -> CounterPool:
    """The counters of a device."""
    return CounterPool(torch.device("cuda", device))


def counters(count: int) -> torch.Tensor:
    """Zeros for a launch on torch's current stream, to be kept until it is launched: see `CounterPool`."""
    stream = torch.cuda.current_stream()
    capture = _capture_id(stream.cuda_stream) if torch.cuda.is_current_stream_capturing() else 0
    return counter_pool(stream.device_index).take(count, stream.cuda_stream, capture)


def _capture_id(stream: int) -> int | None:
    """The number of the graph capture under way, None if the driver does not tell (of graphs with special edges)."""
    error, _, number, *_ = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    return int(number) if error == driver.CUresult.CUDA_SUCCESS else None


def _shape(name: str, grid: tuple[int, int]) -> Any:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = VARIANTS[name].threads, 1, 1
    config.sharedMemBytes = _SHARED_BYTES
    return config


def _cluster(size: int) -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = size, 1, 1
    return attribute


@cache
def most_clusters(name: str, size: int, device: int) -> int:
    """How many clusters of that many CTAs of a kernel a device runs at once; 0 if none of that size."""
    config, attributes = _shape(name, (size, 1)), [_cluster(size)]
    config.attrs, config.numAttrs = attributes, len(attributes)
    error, count = driver.cuOccupancyMaxActiveClusters(_kernel(name, device), config)
    return 0 if error == driver.CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE else check((error, count))


def launch(
    name: str, params: ctypes.Structure, grid: tuple[int, int], cluster: int = 1, *, together: bool = True
) -> None:
    """Launch a kernel on torch's current stream; it may start while the kernel before it ends (and waits for it).

    Args:
        name: of the kernel.
        params: its parameter.
        grid: blocks, and clusters of the first dimension's.
        cluster: blocks of a cluster.
        together: without clusters, whether the blocks wait for each other.
    """
    function = _kernel(name, torch.cuda.current_device())
    config = _shape(name, grid)
    config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
    overlap = driver.CUlaunchAttribute()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    attributes = [overlap]
    if cluster == 1 and together:
        # Programs wait for each other's partial results, so all of a grid must run together, also beside another
        # stream's: the driver sees to it, or refuses. With clusters that was not tried.
        cooperative = driver.CUlaunchAttribute()
        cooperative.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        cooperative.value.cooperative = 1
        attributes.append(cooperative)
    elif cluster > 1:
        attributes.append(_cluster(cluster))
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
