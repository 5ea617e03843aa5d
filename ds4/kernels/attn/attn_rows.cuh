// Which rows a token attends to, where they lie, and how they are cut into tiles and spans.
#pragma once

#include "kv_rows.cuh"

constexpr int kTile = 32;      // rows that a block takes at a time
constexpr int kMaxSpans = 32;  // parts that the rows are cut into: one a lane where they are put together

constexpr int kRatio = RATIO > 0 ? RATIO : 0x7fffffff;  // without a pool the first entry never comes

// Rows are numbered: the window's by position, then the pool's by index. All of this follows from the token's position;
// there are no divisions but by constants, as everything else waits for the result.
struct VisibleRows {
  int first;           // position of the window's oldest row
  int n_window;        // rows of the window
  int n_rows;          // and with those of the pool, at least one
  int n_tiles;         // the last one may be shorter
  int tiles_per_span;  // but in the last span

  __device__ __forceinline__ bool has_span(int span) const { return span * tiles_per_span < n_tiles; }
};

__device__ __forceinline__ VisibleRows visible_rows(int position, int window, int max_pool) {
  VisibleRows rows;
  rows.first = max(0, position - window + 1);
  rows.n_window = position + 1 - rows.first;
  rows.n_rows = rows.n_window + min((position + 1) / kRatio, max_pool);
  rows.n_tiles = (rows.n_rows + kTile - 1) / kTile;
  rows.tiles_per_span = (rows.n_tiles + kMaxSpans - 1) / kMaxSpans;
  return rows;
}

// The caches of one layer, as one token sees them.
struct RowSource {
  const unsigned char* ring;
  const unsigned char* pool;
  const int* selected;  // the token's, or null: the pool's rows in order
  int first_slot;       // of the window's oldest row
  int n_window;

  __device__ __forceinline__ const unsigned char* row(int r) const {
    if (RATIO == 0 || r < n_window) {
      const int slot = first_slot + r;
      return ring + (slot < RING_SLOTS ? slot : slot - RING_SLOTS) * kRowBytes;
    }
    const int entry = selected ? selected[r - n_window] : r - n_window;
    return pool + static_cast<size_t>(entry) * kRowBytes;
  }
};
