// A matrix of experts by its format: all of mma_rows.cuh's formats in one place, and SwiGLU.
#pragma once

#include "dense_tiles.cuh"
#include "fp4_weights.cuh"
#include "iq2_weights.cuh"
#include "kquant_weights.cuh"
#include "math.cuh"

template <class Matrix>
constexpr bool kNeedsPatterns = false;
template <int kCols>
constexpr bool kNeedsPatterns<Iq2Tile<kCols>> = true;

// `patterns`: those of IQ2_XXS in shared memory.
template <class Matrix>
__device__ __forceinline__ Matrix make_matrix(const PlanePointers& planes, const uint4* patterns) {
  if constexpr (kNeedsPatterns<Matrix>) {
    return Matrix(planes, patterns);
  } else {
    return Matrix(planes);
  }
}

// Comparisons with a NaN are false, so that a NaN stays one.
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  const float g = gate > limit ? limit : gate;
  const float u = up > limit ? limit : up < -limit ? -limit : up;
  return __fmul_rn(silu(g), u);
}
