// SPDX-License-Identifier: Apache-2.0
// Where the row of a listed key lies, for sparse attention.
#pragma once

#include "params.cuh"

// The keys of a request. An entry is a slot of the cache, or with a block table a position within the request.
template <int ROW_BYTES>
class ListedRows {
  public:
    __device__ ListedRows(const Params& p, int request)
        : p_(p), inverse_(p.page_size > 0 ? ~0u / unsigned(p.page_size) : 0) {
        if (p.max_pages > 0) table_ = p.block_table + divide(request, p.sharers) * p.table_stride;
    }

    // Null if there is no such key: a negative entry, or one outside the cache or the block table.
    __device__ const uint8_t* row(int entry) const {
        if (entry < 0) return nullptr;
        if (p_.page_size == 0) return entry < p_.num_pages ? p_.cache + entry * int64_t{ROW_BYTES} : nullptr;
        int page = __umulhi(entry, inverse_);  // or one less: an entry is below 2^31
        int row = entry - page * p_.page_size;
        if (row >= p_.page_size) ++page, row -= p_.page_size;
        if (p_.max_pages > 0) {
            if (page >= p_.max_pages) return nullptr;
            page = table_[page];
        }
        if (unsigned(page) >= unsigned(p_.num_pages)) return nullptr;
        return p_.cache + page * p_.page_stride + row * int64_t{ROW_BYTES};
    }

    // Asks for the beginning of the table, a line by each of some threads at a time.
    template <int THREADS>
    __device__ void prefetch_table(int thread) const {
        constexpr int kOfLine = 128 / 4, kMost = 4;  // lines a thread
#pragma unroll 1
        for (int i = 0; i < kMost; ++i) {
            const int entry = (i * THREADS + thread) * kOfLine;
            if (entry >= p_.max_pages) break;
            prefetch_line(table_ + entry);
        }
    }

  private:
    const Params& p_;
    const unsigned inverse_;
    const int* table_;  // the request's, where there are tables
};
