// How many compressed entries a token sees.
#pragma once

// Of a CSA layer, whose entries stand for 4 tokens each, at a position; never more than there is room for.
__device__ __forceinline__ int visible_entries(int position, int n_entries) { return min((position + 1) / 4, n_entries); }
