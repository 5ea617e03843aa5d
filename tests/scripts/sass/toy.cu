#include "toy.cuh"
extern "C" __global__ void toy(const unsigned char* codes, const unsigned char* scales, float* y, int n, int m) {
  const Nvfp4Tile w{codes, scales};
  float sum = 0.f;
#pragma unroll 1
  for (int chunk = threadIdx.x; chunk < n; chunk += 32) {
    uint4 v = w.load(chunk);
    const float scale = __uint_as_float(w.scale(chunk));
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      sum = fmaf(__uint_as_float(v.x), scale, sum);
      v = make_uint4(v.y, v.z, v.w, 0u);
    }
    if (chunk % 64 == 0) {
#pragma unroll 1
      for (int j = 0; j < m; ++j) __stcg(y + j, sum);
    }
  }
  y[threadIdx.x] = sum + __uint_as_float(w.load(m).w);
}
