// Device arithmetic. The fast-math names are the accurate functions here; a GPU's __expf and rsqrtf round differently.
#pragma once

#include "core.h"

// ---- rounding named in the function: the builder forbids contraction, so an operator is exactly that
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }
inline float fdividef(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __exp10f(float a) { return powf(10.0f, a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline void __sincosf(float a, float* s, float* c) { *s = sinf(a), *c = cosf(a); }
inline float sinpif(float a) { return static_cast<float>(sin(M_PI * a)); }
inline float cospif(float a) { return static_cast<float>(cos(M_PI * a)); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }

// ---- fused multiply-adds that the CUDA headers have for the device alone; rounded to FP64 before, which hardly shows
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(fma(__half2float(a), __half2float(b), static_cast<double>(__half2float(c))));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                        __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(fma(__bfloat162float(a), __bfloat162float(b), static_cast<double>(__bfloat162float(c))));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                            __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}

// ---- conversions; a GPU clamps what does not fit and takes NaN for 0
namespace cuemu {
template <class I>
I to_integer(double rounded) {
  constexpr double low = std::is_signed_v<I> ? -2147483648.0 : 0.0;
  constexpr double high = std::is_signed_v<I> ? 2147483647.0 : 4294967295.0;
  if (rounded != rounded) return 0;
  return static_cast<I>(rounded < low ? low : rounded > high ? high : rounded);
}
}  // namespace cuemu
inline int __float2int_rn(float a) { return cuemu::to_integer<int>(nearbyintf(a)); }
inline int __float2int_rz(float a) { return cuemu::to_integer<int>(truncf(a)); }
inline int __float2int_rd(float a) { return cuemu::to_integer<int>(floorf(a)); }
inline int __float2int_ru(float a) { return cuemu::to_integer<int>(ceilf(a)); }
inline unsigned __float2uint_rn(float a) { return cuemu::to_integer<unsigned>(nearbyintf(a)); }
inline unsigned __float2uint_rz(float a) { return cuemu::to_integer<unsigned>(truncf(a)); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }

namespace cuemu {
template <class To, class From>
To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cuemu
inline float __int_as_float(int a) { return cuemu::reinterpret<float>(a); }
inline float __uint_as_float(unsigned a) { return cuemu::reinterpret<float>(a); }
inline int __float_as_int(float a) { return cuemu::reinterpret<int>(a); }
inline unsigned __float_as_uint(float a) { return cuemu::reinterpret<unsigned>(a); }
inline double __longlong_as_double(long long a) { return cuemu::reinterpret<double>(a); }
inline long long __double_as_longlong(double a) { return cuemu::reinterpret<long long>(a); }

// ---- bits
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll(static_cast<unsigned long long>(a)) : 64; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline unsigned __brev(unsigned a) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (a >> i & 1) << (31 - i);
  return r;
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (pick & 7)) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;  // the sign, replicated
    result |= byte << 8 * i;
  }
  return result;
}

// ---- four bytes at a time; sums wrap around
namespace cuemu {
template <class Byte>
unsigned dot4(unsigned a, unsigned b, unsigned sum) {
  for (int i = 0; i < 32; i += 8) {
    const int x = static_cast<Byte>(a >> i), y = static_cast<Byte>(b >> i);
    sum += static_cast<unsigned>(x * y);
  }
  return sum;
}
template <class F>
unsigned bytewise(unsigned a, unsigned b, F f) {
  unsigned result = 0;
  for (int i = 0; i < 32; i += 8) result |= (f(a >> i & 255, b >> i & 255) & 255u) << i;
  return result;
}
}  // namespace cuemu
inline int __dp4a(int a, int b, int sum) {
  return static_cast<int>(cuemu::dot4<signed char>(a, b, static_cast<unsigned>(sum)));
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) { return cuemu::dot4<unsigned char>(a, b, sum); }
inline unsigned __vadd4(unsigned a, unsigned b) {
  return cuemu::bytewise(a, b, [](unsigned x, unsigned y) { return x + y; });
}
inline unsigned __vsub4(unsigned a, unsigned b) {
  return cuemu::bytewise(a, b, [](unsigned x, unsigned y) { return x - y; });
}
inline unsigned __vcmpeq4(unsigned a, unsigned b) {
  return cuemu::bytewise(a, b, [](unsigned x, unsigned y) { return x == y ? 255u : 0u; });
}
inline unsigned __vcmpne4(unsigned a, unsigned b) {
  return cuemu::bytewise(a, b, [](unsigned x, unsigned y) { return x != y ? 255u : 0u; });
}

// ---- CUDA's min and max take two different arithmetic types
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  if constexpr (std::is_floating_point_v<decltype(x)>) return fmin(x, y);
  return y < x ? y : x;
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  if constexpr (std::is_floating_point_v<decltype(x)>) return fmax(x, y);
  return x < y ? y : x;
}
