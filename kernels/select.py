# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves a call, with which tile sizes: one table. Pure Python: tools can ask without a GPU or torch."""

from dataclasses import dataclass

MAX_H_Q = 128
"""Most query heads."""
MAX_S_Q = 8
"""Most query tokens of a request."""


@dataclass(frozen=True)
class DecodeConfig:
    """A kernel and its launch shape.

    Attributes:
        kernel: "triton" for the portable kernel, a name of `HOPPER_KERNELS`, or "reference" for eager PyTorch.
        block_h: query rows (s_q x h_q) of a program.
        block_n: KV tokens of a tile.
        num_warps, num_stages: Triton's launch options.
        programs_per_sm: programs resident on a multiprocessor.
        fixed_tiles, min_tiles: see `schedule.ScheduleParams`.
        reason: why this entry was chosen, for the log.
        groups: column groups of the latent in the portable sparse kernel, see `attend`.
    """

    kernel: str
    block_h: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    fixed_tiles: int
    min_tiles: int
    reason: str
    groups: int = 1


_ANY_ROWS = MAX_S_Q * MAX_H_Q
_SIXTEEN_BIT, _FP8, _DS_MLA = ("bf16", "fp16"), ("fp8",), ("fp8_ds_mla",)

# First row that fits wins. Rows for 9.0 were chosen by measurement on an H200 (docs/performance.md). The others keep
# within 99 KiB of shared memory, what compute capability 8.6, 8.9 and 12.0 offer, and were compiled, not timed.
_TABLE = (
    # capability from, to | caches | most rows | block_h, block_n, warps, stages, programs a SM, fixed, min tiles
    ((9, 0), (9, 0), _SIXTEEN_BIT, 16, (16, 64, 4, 2, 2, 1, 1)),
    ((9, 0), (9, 0), _SIXTEEN_BIT, 32, (32, 64, 4, 3, 2, 1, 1)),
    ((9, 0), (9, 0), _SIXTEEN_BIT, _ANY_ROWS, (64, 64, 8, 2, 1, 1, 1)),
    ((9, 0), (9, 0), _FP8, 16, (16, 64, 4, 2, 2, 1, 1)),
    ((9, 0), (9, 0), _FP8, 32, (32, 64, 4, 3, 2, 1, 1)),
    ((9, 0), (9, 0), _FP8, _ANY_ROWS, (64, 64, 8, 2, 1, 1, 1)),
    ((9, 0), (9, 0), _DS_MLA, 16, (16, 64, 4, 2, 2, 1, 1)),  # compiled, not timed, as is the next
    ((9, 0), (9, 0), _DS_MLA, _ANY_ROWS, (32, 64, 8, 2, 1, 1, 1)),  # 64 rows would spill a kilobyte a thread
    ((8, 0), (99, 9), _SIXTEEN_BIT, _ANY_ROWS, (16, 32, 4, 2, 1, 1, 2)),
    ((8, 0), (99, 9), _FP8 + _DS_MLA, _ANY_ROWS, (16, 32, 4, 2, 2, 1, 2)),
)
# Sparse attention, where a program has the heads of one query token. Tile sizes and warps as measured for the dense
# kernel; narrower groups of columns, so that a thread computes fewer of the gathered rows' addresses: by the compiler's
# report 16 rows of bf16 take 154 registers and 692 instructions a tile in 8 groups, 244 and 1352 in one. Not timed.
_SPARSE_TABLE = (
    # capability from, to | caches | most heads | as above | groups of columns
    ((9, 0), (9, 0), _SIXTEEN_BIT, 16, (16, 64, 4, 2, 2, 1, 1), 8),
    ((9, 0), (9, 0), _SIXTEEN_BIT, 32, (32, 64, 4, 2, 2, 1, 1), 8),
    ((9, 0), (9, 0), _SIXTEEN_BIT, MAX_H_Q, (64, 64, 8, 2, 1, 1, 1), 4),
    ((9, 0), (9, 0), _FP8, 16, (16, 64, 4, 2, 2, 1, 1), 8),
    ((9, 0), (9, 0), _FP8, 32, (32, 64, 4, 2, 2, 1, 1), 4),  # ptxas gives up on 8 groups: 6 KiB of spills
    ((9, 0), (9, 0), _FP8, MAX_H_Q, (64, 64, 8, 2, 1, 1, 1), 4),
    ((9, 0), (9, 0), _DS_MLA, 16, (16, 64, 4, 2, 2, 1, 1), 4),
    ((9, 0), (9, 0), _DS_MLA, MAX_H_Q, (32, 64, 4, 2, 2, 1, 1), 4),  # 64 rows would spill a kilobyte a thread
    ((8, 0), (99, 9), _SIXTEEN_BIT, MAX_H_Q, (16, 32, 4, 2, 1, 1, 2), 8),
    ((8, 0), (99, 9), _FP8 + _DS_MLA, MAX_H_Q, (16, 32, 4, 2, 2, 1, 2), 4),
)
HOPPER_KERNELS = ("swapab", "twowg", "twowg_e4m3", "twowg_rows", "twowg_gather", "swapab_gather")
"""Names of the CUDA kernels in hopper/."""
_BLOCKS = 8, 16, 24, 32
"""Query rows that a block of the swap-AB kernel may hold."""
_HOPPER_TABLE = (
    # caches | most rows | kernel, query rows of a block
    *((_SIXTEEN_BIT + _FP8 + _DS_MLA, rows, ("swapab", rows)) for rows in _BLOCKS),
    (_SIXTEEN_BIT + _FP8, _ANY_ROWS, ("twowg", 64)),
    (_DS_MLA, _ANY_ROWS, ("twowg_rows", 64)),
)
_HOPPER_SPARSE_TABLE = (
    # caches | most heads | kernel, heads of a block | most blocks of 16 heads of a launch
    (_SIXTEEN_BIT + _DS_MLA, 8, ("swapab_gather", 8), 0),
    (_SIXTEEN_BIT + _DS_MLA, 16, ("swapab_gather", 16), 0),
    (_SIXTEEN_BIT + _DS_MLA, 24, ("swapab_gather", 24), 4),
    (_DS_MLA, 32, ("swapab_gather", 32), 16),
    (_SIXTEEN_BIT, MAX_H_Q, ("twowg_gather", 64), 16),
    (_DS_MLA, MAX_H_Q, ("twowg_gather", 64), 32),
)
"""The last column: up to so many, the swap-AB kernel with blocks of 16 heads is faster. Each gathers a list again, but
more of the GPU takes part. Measured with 64 heads and 1 to 8 tokens, 32 heads and 1 and 8, 128 heads and one."""
_FEW_TILES_TABLE = (
    # caches | query rows of a block | most tiles of all blocks together for each multiprocessor
    (_SIXTEEN_BIT, 16, 5),
    (_SIXTEEN_BIT, 32, 7),
    (_FP8, 16, 10),
    (_FP8, 32, 8),
    (_FP8, 64, 12),
    (_DS_MLA, 16, 22),
)
"""Where batches of more than 32 rows a request are so small that the swap-AB kernel is faster than the 64-row one,
though each of its blocks reads the cache again; a block of 64 rows: where that one is faster without rounding to e4m3
than with it, if it may. The first row that fits wins."""
_FIXED_TILES = 3, 5
"""What an item of a Hopper kernel costs beside its tiles, in tiles of 16-bit caches and of 8-bit ones: by the times of
ragged batches."""
_PORTABLE_PREFILL = range(9, 17)
"""Heads with which prefill on a 16-bit cache is faster in the portable kernel, whose tiles have no idle rows then."""
_FEW_HEADS = 16
FEW_TOKENS = 8
"""Most query tokens on which the choice of a sparse kernel may depend."""
HOPPER_TILE, _HOPPER_WARPS = 64, 12
LARGEST_TILE = max(HOPPER_TILE, *(values[1] for *_, values in _TABLE))
"""Tokens of the largest KV tile: pages of a multiple of it hold whole tiles of every kernel."""


def _few_limits(rows: int, cache_format: str, fp8_mma: bool) -> list[tuple[int, int]]:
    """Blocks and most tiles of `_FEW_TILES_TABLE` that concern a call; none where one block holds its rows anyway."""
    if rows <= _BLOCKS[-1]:
        return []
    blocks = (*_BLOCKS, 64) if fp8_mma else _BLOCKS
    return [(block, most) for caches, block, most in _FEW_TILES_TABLE if cache_format in caches and block in blocks]


def few_blocks(rows: int, cache_format: str, fp8_mma: bool = False) -> tuple[int, ...]:
    """All that `few_rows` may answer but None."""
    return tuple(block for block, _ in _few_limits(rows, cache_format, fp8_mma))


def few_rows(rows: int, cache_format: str, tiles: int, num_sms: int, fp8_mma: bool = False) -> int | None:
    """Query rows of a block of the kernel that serves a small batch better than the usual one, or None: 16 or 32 of the
    swap-AB kernel's, or 64 of the kernel that does not round to e4m3.

    Args:
        rows, cache_format, fp8_mma: as of `select_decode`.
        tiles: most KV tiles of the batch, of 64 tokens.
        num_sms: multiprocessors of the GPU.
    """
    for block, most in _few_limits(rows, cache_format, fp8_mma):
        if tiles * -(-rows // block) <= most * num_sms:
            return block
    return None


def select_decode(
    arch: tuple[int, int] | None,
    rows: int,
    cache_format: str,
    hopper: bool = False,
    fp8_mma: bool = False,
    few: int | None = None,
) -> DecodeConfig:
    """Choose the dense decode kernel.

    Args:
        arch: compute capability of the GPU, None for a CPU.
        rows: query rows that share a request's cache, ``s_q * h_q``.
        cache_format: name from `layout.cache_format`.
        hopper: whether the compiled kernels of hopper/ are there, see `hopper.available`.
        fp8_mma: whether query and weights may be rounded to e4m3 where that is faster: on Hopper, with `fp8` caches
            and more than 32 rows.
        few: from `few_rows`, for a batch known to be small.

    Raises:
        ValueError: no kernel serves this call; the message says why.
    """
    if arch is None:
        return DecodeConfig("reference", rows, 64, 0, 0, 1, 1, 1, "no GPU: PyTorch reference")
    if hopper and arch == (9, 0):
        for caches, most_rows, (kernel, block_h) in _HOPPER_TABLE:
            if cache_format in caches and rows <= most_rows:
                reason = f"compute capability 9.0, {rows} query rows a request, {cache_format} cache"
                if few is not None:
                    kernel, block_h, reason = "swapab" if few in _BLOCKS else kernel, few, f"{reason}, few tiles"
                elif kernel == "twowg" and cache_format == "fp8" and fp8_mma:
                    kernel = "twowg_e4m3"
                fixed = _FIXED_TILES[cache_format not in _SIXTEEN_BIT]
                return DecodeConfig(kernel, block_h, HOPPER_TILE, _HOPPER_WARPS, 0, 1, fixed, 1, reason)
    return select_portable(arch, rows, cache_format)


def select_portable(arch: tuple[int, int], rows: int, cache_format: str) -> DecodeConfig:
    """The portable Triton kernel for a call, whether or not another kernel is preferred; as `select_decode`."""
    if cache_format not in _SIXTEEN_BIT + _FP8 + _DS_MLA:
        raise ValueError(f"dense decode on a GPU reads bf16, fp16, fp8 and fp8_ds_mla caches, not {cache_format}")
    for least, most, caches, most_rows, values in _TABLE:
        if least <= arch <= most and cache_format in caches and rows <= most_rows:
            reason = f"compute capability {arch[0]}.{arch[1]}, {rows} query rows a request, {cache_format} cache"
            return DecodeConfig("triton", *values, reason)
    raise ValueError(f"no dense decode kernel for compute capability {arch[0]}.{arch[1]} and {rows} query rows")


def select_sparse(
    arch: tuple[int, int],
    h_q: int,
    cache_format: str,
    hopper: bool = False,
    tokens: int | None = None,
    prefill: bool = False,
) -> DecodeConfig:
    """Choose the sparse attention kernel.

    Args:
        arch, cache_format, hopper: as of `select_decode`, whose `rows` is ``h_q`` here.
        h_q: query heads.
        tokens: query tokens of a launch, where the choice may depend on it.
        prefill: whether the kernel is for prefill.

    Raises:
        ValueError: no kernel serves this call; the message says why.
    """
    if cache_format not in _SIXTEEN_BIT + _FP8 + _DS_MLA:
        raise ValueError(f"sparse attention on a GPU reads bf16, fp16, fp8 and fp8_ds_mla caches, not {cache_format}")
    if prefill and cache_format in _SIXTEEN_BIT and h_q in _PORTABLE_PREFILL:
        hopper = False
    if hopper and arch == (9, 0):
        for formats, most_heads, (kernel, block_h), most_blocks in _HOPPER_SPARSE_TABLE:
            if cache_format in formats and h_q <= most_heads:
                blocks = (tokens or 0) * -(-h_q // _FEW_HEADS)
                if tokens is not None and tokens <= FEW_TOKENS and blocks <= most_blocks:
                    kernel, block_h = "swapab_gather", _FEW_HEADS
                reason = f"compute capability 9.0, {h_q} query heads, {cache_format} cache"
                return DecodeConfig(kernel, block_h, HOPPER_TILE, _HOPPER_WARPS, 0, 1, 1, 1, reason)
    for least, most, caches, most_rows, values, groups in _SPARSE_TABLE:
        if least <= arch <= most and cache_format in caches and h_q <= most_rows:
            reason = f"compute capability {arch[0]}.{arch[1]}, {h_q} query heads, {cache_format} cache"
            return DecodeConfig("triton", *values, reason, groups)
    raise ValueError(f"no sparse attention kernel for compute capability {arch[0]}.{arch[1]} and {h_q} query heads")
