// How many rows of a launch for up to n_rows tokens carry one: prefill operations are made for a capacity.
#pragma once

// count i32 [1], or null where all rows are live. Never more than n_rows, whatever is in memory.
__device__ __forceinline__ int live_rows(const int* count, int n_rows) { return count ? min(*count, n_rows) : n_rows; }
