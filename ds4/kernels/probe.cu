// A kernel to see whether this machine compiles and runs kernels at all; no part of the model.
// y[i] = scale * i, rounded to bf16 on the way, so that a header of the toolkit and each kind of argument are used.
// Grid: any number of blocks that covers n threads.
#include <cuda_bf16.h>

extern "C" __global__ void probe(float* __restrict__ y, // [n], OUT
                                 int n, float scale) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = __bfloat162float(__float2bfloat16(scale * static_cast<float>(i)));
}
