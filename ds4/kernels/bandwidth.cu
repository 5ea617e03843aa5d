// What the memory of a card gives: bandwidth_read reads x, bandwidth_copy writes it to y; n is the number of 16-byte
// pieces, a multiple of 4 x 256. Grid: any number of blocks, block 256; each thread has 4 loads in flight.
struct Piece {
  float4 part[4];
};

__device__ __forceinline__ Piece load(const float* x, long long tile) {
  const float4* from = reinterpret_cast<const float4*>(x) + tile * 1024 + threadIdx.x;
  Piece piece;
#pragma unroll
  for (int i = 0; i < 4; ++i) piece.part[i] = from[i * 256];
  return piece;
}

extern "C" __global__ void __launch_bounds__(256) bandwidth_copy(const float* x, float* y, long long n) {
  for (long long tile = blockIdx.x; tile < n / 1024; tile += gridDim.x) {
    const Piece piece = load(x, tile);
    float4* to = reinterpret_cast<float4*>(y) + tile * 1024 + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i * 256] = piece.part[i];
  }
}

// y f32 [gridDim.x * 256]: the sum of what each thread read, so that no load can be left out.
extern "C" __global__ void __launch_bounds__(256) bandwidth_read(const float* x, float* y, long long n) {
  float sum = 0.f;
  for (long long tile = blockIdx.x; tile < n / 1024; tile += gridDim.x) {
    const Piece piece = load(x, tile);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += piece.part[i].x + piece.part[i].y + piece.part[i].z + piece.part[i].w;
  }
  y[blockIdx.x * 256 + threadIdx.x] = sum;
}
