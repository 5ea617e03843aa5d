// Activation functions from accurate primitives; nothing here uses fast-math. FP32, NaN in gives NaN out.
#pragma once

// log(1 + e^x), and x itself above 20, as torch's softplus (model.md 2.7, router scores).
__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

// 1 / (1 + e^-x). Below -88.7, where e^-x overflows, it is 0.
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// x sigmoid(x), as x / (1 + e^-x): one rounding less. Below -88.7 it is -0, off by less than 3e-37.
__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }
