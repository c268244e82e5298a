// SPDX-License-Identifier: Apache-2.0
// Where the row of a listed key lies, for sparse attention.
#pragma once

#include "params.cuh"

// Null if there is no such key: a negative entry, or one outside the cache or the block table. An entry is a slot of the
// cache, or with a block table a position within the request.
template <auto ROW_BYTES>
__device__ inline const uint8_t* listed_row(const Params& p, int request, int entry) {
    if (entry < 0) return nullptr;
    if (p.page_size == 0) return entry < p.num_pages ? p.cache + entry * int64_t{ROW_BYTES} : nullptr;
    int page = unsigned(entry) / unsigned(p.page_size);  // too large for divide()
    const int row = entry - page * p.page_size;
    if (p.max_pages > 0) {
        if (page >= p.max_pages) return nullptr;
        page = p.block_table[divide(request, p.sharers) * p.table_stride + page];
    }
    if (unsigned(page) >= unsigned(p.num_pages)) return nullptr;
    return p.cache + page * p.page_stride + row * ROW_BYTES;
}
