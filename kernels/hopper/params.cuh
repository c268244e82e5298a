// SPDX-License-Identifier: Apache-2.0
// The one parameter of every kernel here. params.py mirrors it field by field.
#pragma once

#include "ptx_copy.cuh"

constexpr int kTile = 64;   // KV tokens of a tile
constexpr int kGroup = 8;   // tokens copied by one instruction: their rows are one stretch of memory
constexpr int kLatent = 512;
constexpr int kRope = 64;

struct Schedule {
    int b;
    int programs;  // per block of query rows
    int fixed_tiles, min_tiles;
    int min_share;  // of a program, in tiles and fixed tiles
    int batch_invariant, max_splits;
    int length;  // of every request, where there are no seq_lens
};

struct Strides {  // in elements
    int64_t b, s, h;
};

struct Params {
    // Of columns, 8 tokens, blocks of columns, groups of 8 tokens of a page, pages: see decode.py. 16-bit caches: whole rows.
    TensorMap latent;
    TensorMap rope;        // 8-bit caches; of 16-bit ones where it is copied apart (twowg)
    TensorMap scales;      // fp8_ds_mla
    const void* q_nope;    // [b, s_q, h_q, 512]
    const void* q_rope;    // [b, s_q, h_q, 64]
    const uint8_t* cache;    // where rows are not copied by the maps: [num_pages, page_size, row bytes]
    const int* indices;      // [b, index_stride], the keys of each request where it lists them
    const int* block_table;  // [b, max_pages]
    const int* seq_lens;   // [b], or null
    void* out;             // [b, s_q, h_q, 512]
    float* lse;            // [b, s_q, h_q]
    float* partial_out;    // [slots, s_q * h_q, 512]
    float* partial_lse;    // [slots, s_q * h_q], base-2 logarithm
    unsigned* arrivals;    // [b, row blocks], zero between launches
    const float* k_scale;  // null: k_scale_value counts
    Strides q_nope_stride, q_rope_stride;
    int64_t page_stride;     // of `cache`, in bytes
    int64_t index_stride;
    int64_t table_stride;
    Schedule schedule;
    float k_scale_value;
    float scale_log2;  // softmax scale times log2(e)
    int s_q, h_q;
    int causal;
    int page_size;
    int q_is_fp16;     // 8-bit caches: dtype of q and out
    // Where keys are listed: bound of pages (page_size 0: a page is a row, and follows the one before); entries of a
    // request's table, also where they are not (0: slots are listed, not positions); how many requests share a table.
    int num_pages, max_pages, sharers;
    float* max_logits;  // [b, h_q], 16-bit rows of listed keys: the largest scores come on top of what is there; or null
};
