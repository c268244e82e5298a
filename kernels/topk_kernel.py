# SPDX-License-Identifier: Apache-2.0
# The kernel carries values between phases that Triton unrolls, which mypy cannot follow.
# mypy: disable-error-code="assignment, misc"
"""Kernel of the exact top-k: radix selection over the bits of float32 values, one or several programs a row.

A float32 becomes an unsigned integer of the same order, 0 for what is never selected. Three histograms over 11, 11 and
10 of its bits, each over the values that agree with the digits found so far, give the k-th largest value and how many
values equal to it belong to the result; a last pass writes the indices in ascending order (radix select, Alabi et al.,
"Fast k-selection algorithms for graphics processing units", JEA 17, 2012).

Phases 0 to 2 make the histograms, phase 3 counts what each program will write, phase 4 writes. The programs of a row
meet between phases, in one cooperative launch through a counter in global memory; where programs run one after the
other, as in Triton's interpreter, each phase is a launch of its own. What the next phase needs passes through the row's
workspace, which is zero before the launch and after it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .shared_bins import BINS, clear_bins, count_in_bins, read_bins, shared_bins

PHASES = 5
MAX_PARTS = 64
STATE_OFFSET = 3 * BINS
COUNTS_OFFSET = STATE_OFFSET + 8
COUNTER_OFFSET = COUNTS_OFFSET + 2 * MAX_PARTS
WORKSPACE_ROW = COUNTER_OFFSET + 8
"""Words of a row's workspace: three histograms, two words of state a phase, two counts a program, two counters."""

_BINS = tl.constexpr(BINS)
_MAX_PARTS = tl.constexpr(MAX_PARTS)
_STATE = tl.constexpr(STATE_OFFSET)
_COUNTS = tl.constexpr(COUNTS_OFFSET)
_COUNTER = tl.constexpr(COUNTER_OFFSET)
_ROW = tl.constexpr(WORKSPACE_ROW)


@triton.jit
def _load_keys(row, position, lead, stop, readable):
    """Values at `position` as ordered integers, 0 for -inf, NaN and what lies before `lead` or from `stop` on.

    `readable` is what `stop` is rounded up to, so that a vector of loads has one predicate.
    """
    x = tl.load(row + position, mask=position < readable, other=-float("inf"))
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 equals 0.0
    bits = x.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    return tl.where((x > -float("inf")) & (position >= lead) & (position < stop), key, 0)


@triton.jit
def _select_digit(counts, threshold, remaining, SHIFT: tl.constexpr):
    """The bin of the `remaining`-th largest value: the threshold with its digit, and how many to take of that bin.

    Where all of the bin is to be taken nothing remains, and everything above the threshold belongs to the result. So it
    does where there are too few values, with threshold 0.
    """
    suffix = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # values in this bin and above
    enough = suffix >= remaining
    digit = tl.sum(enough.to(tl.int32), 0) - 1
    above = tl.max(tl.where(enough, 0, suffix), 0)
    reached = tl.min(tl.where(enough, suffix, 2147483647), 0)
    whole = reached == remaining
    threshold += digit.to(tl.uint32) << SHIFT
    threshold = tl.where(digit < 0, 0, tl.where(whole, threshold - 1, threshold))
    remaining = tl.where((digit < 0) | whole, 0, remaining - above)
    return threshold.to(tl.uint32), remaining


@triton.jit
def _histogram(
    row, begin, lead, stop, readable, bins, threshold,
    PHASE: tl.constexpr, TILE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Counts of digit PHASE among the values from `begin` to `stop` that agree with the threshold's digits before."""
    SHIFT: tl.constexpr = 21 - 11 * PHASE if PHASE < 2 else 0
    AGREE: tl.constexpr = 32 - 11 * PHASE
    counts = tl.zeros([_BINS], tl.int32)
    if not INTERPRETED:
        clear_bins(bins)
        tl.debug_barrier()
    for first in range(begin, stop, TILE):
        key = _load_keys(row, first + tl.arange(0, TILE), lead, stop, readable)
        live = key > 0
        if PHASE > 0:
            live = (key >> AGREE) == (threshold >> AGREE)
        digit = ((key >> SHIFT) & (_BINS - 1 if PHASE < 2 else 1023)).to(tl.int32)
        if INTERPRETED:
            counts += tl.histogram(digit, _BINS, mask=live)
        else:
            count_in_bins(bins, digit, live)
    if not INTERPRETED:
        tl.debug_barrier()
        counts = read_bins(bins)
        tl.debug_barrier()
    return counts


@triton.jit
def _write_indices(row, out, begin, lead, stop, readable, threshold, ties, slot, ties_before, TILE: tl.constexpr):
    """Write what is above the threshold, and the first `ties` values of the row equal to it, in ascending order.

    `slot` and `ties_before` are the values above and equal to the threshold before `begin`. Returns them for `stop`.
    """
    for first in range(begin, stop, TILE):
        position = first + tl.arange(0, TILE)
        key = _load_keys(row, position, lead, stop, readable)
        above = (key > threshold).to(tl.int32)
        equal = tl.where(ties > 0, (key == threshold).to(tl.int32), 0)
        both = above + (equal << 16)  # one scan for two counts
        scanned = tl.cumsum(both, 0)
        rank = slot + (scanned & 0xFFFF) - above
        tie = ties_before + (scanned >> 16) - equal
        keep = (above > 0) | ((equal > 0) & (tie < ties))
        tl.store(out + rank + tl.minimum(tie, ties), position - lead, mask=keep)
        both = tl.sum(both, 0)
        slot += both & 0xFFFF
        ties_before += both >> 16
    return slot, ties_before


@triton.jit
def _meet(counter, target):
    """Wait until all programs of the row have come here; what they wrote before is visible after."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1)
    while tl.atomic_add(counter, 0) < target:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n", "k", "repeat", "least_part"])
def topk_kernel(
    logits,  # [rows, n]
    starts,  # [rows], read only with HAS_STARTS
    ends,  # [rows / repeat]
    out,  # [rows, k]
    workspace,  # [rows, WORKSPACE_ROW], used only with MULTI
    n,
    k,
    repeat,
    least_part,
    row_stride,
    out_stride,
    HAS_STARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    MULTI: tl.constexpr,
    TILE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    part = tl.program_id(0)
    row = tl.program_id(1)
    bins = 0
    if not INTERPRETED:
        bins = shared_bins()
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    end = tl.load(ends + row // repeat) - (repeat - 1) + row % repeat
    values = logits + row.to(tl.int64) * row_stride
    start = 0
    lead = 0
    if HAS_STARTS:  # positions count from the vector that the row's part begins in
        start = tl.minimum(tl.maximum(tl.load(starts + row), 0), n)
        lead = start % 4 if VECTOR else 0
        values += start // 4 * 4 if VECTOR else start
    length = tl.maximum(tl.minimum(end, n) - start, 0)
    target = out + row.to(tl.int64) * out_stride
    space = workspace + row.to(tl.int64) * _ROW

    parts = 1
    chunk = lead + length
    if MULTI:  # short rows keep fewer programs; the others leave at once
        parts = tl.where(length <= k, 1, tl.minimum(tl.num_programs(0), tl.cdiv(length, least_part)))
        chunk = tl.cdiv(tl.cdiv(chunk, parts), 16) * 16
    if part < parts:
        begin = part * chunk if MULTI else 0
        stop = tl.minimum(begin + chunk, lead + length)
        readable = stop
        if VECTOR:
            readable = tl.cdiv(stop, 4) * 4
        threshold = tl.zeros([], tl.uint32)
        remaining = tl.where(length <= k, 0, k)
        counts = tl.zeros([_BINS], tl.int32)
        slot = 0
        ties_before = 0
        for phase in tl.static_range(FIRST, LAST):
            if phase > 0 and phase == FIRST:  # what the launch before found out
                threshold = tl.load(space + _STATE + 2 * phase - 2).to(tl.uint32, bitcast=True)
                remaining = tl.load(space + _STATE + 2 * phase - 1)
            if phase >= 1 and phase <= 3:
                if remaining > 0:
                    if MULTI:
                        counts = tl.load(space + (phase - 1) * _BINS + tl.arange(0, _BINS), cache_modifier=".cg")
                    threshold, remaining = _select_digit(
                        counts, threshold, remaining, 32 - 11 * phase if phase < 3 else 0
                    )
            if MULTI:
                if phase < 4 and part == 0:
                    tl.store(space + _STATE + 2 * phase, threshold.to(tl.int32, bitcast=True))
                    tl.store(space + _STATE + 2 * phase + 1, remaining)
                if phase >= 2:  # all programs have read this histogram
                    if length > k:
                        for word in range(part * 128, _BINS, parts * 128):
                            tl.store(space + (phase - 2) * _BINS + word + tl.arange(0, 128), tl.zeros([128], tl.int32))
            if phase <= 2:
                if remaining > 0:
                    counts = _histogram(values, begin, lead, stop, readable, bins, threshold, phase, TILE, INTERPRETED)
                    if MULTI:
                        place = space + phase * _BINS + tl.arange(0, _BINS)
                        tl.atomic_add(place, counts, mask=counts > 0, sem="relaxed")
            if MULTI and phase == 3:
                above = tl.zeros([TILE], tl.int32)
                equal = tl.zeros([TILE], tl.int32)
                for first in range(begin, stop, TILE):
                    key = _load_keys(values, first + tl.arange(0, TILE), lead, stop, readable)
                    above += (key > threshold).to(tl.int32)
                    equal += tl.where(remaining > 0, (key == threshold).to(tl.int32), 0)
                tl.store(space + _COUNTS + part, tl.sum(above, 0))
                tl.store(space + _COUNTS + _MAX_PARTS + part, tl.sum(equal, 0))
            if phase == 4:
                if MULTI:
                    other = tl.arange(0, _MAX_PARTS)
                    place = space + _COUNTS + other
                    slot = tl.sum(tl.load(place, mask=other < part, other=0, cache_modifier=".cg"), 0)
                    place += _MAX_PARTS
                    ties_before = tl.sum(tl.load(place, mask=other < part, other=0, cache_modifier=".cg"), 0)
                slot, ties_before = _write_indices(
                    values, target, begin, lead, stop, readable, threshold, remaining, slot, ties_before, TILE
                )
                if part == parts - 1:
                    for first in range(slot + tl.minimum(ties_before, remaining), k, 256):
                        column = first + tl.arange(0, 256)
                        tl.store(target + column, tl.zeros([256], tl.int32) - 1, mask=column < k)
            if MULTI and phase + 1 < LAST:
                if parts > 1:
                    _meet(space + _COUNTER, parts * (phase + 1))
                else:
                    tl.debug_barrier()
        if MULTI and LAST - FIRST > 1:
            if parts > 1:  # the last to leave makes the counters ready for the next launch
                if tl.atomic_add(space + _COUNTER + 1, 1) == parts - 1:
                    tl.store(space + _COUNTER, 0)
                    tl.store(space + _COUNTER + 1, 0)
