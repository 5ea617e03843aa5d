// The functions of ptx.cuh in C++, for the CPU emulation of the tests (tests/cuemu), whose header comes before this.
// Sums inside an mma are taken in FP64 and rounded once, which no hardware does: compare with a tolerance.
#pragma once

namespace cuemu {

// d += a b of a whole warp. `Value(word, i)` is value i of a register that holds kPerWord of them.
template <class D, class Sum, int kPerWord, class Value>
struct Mma {
  struct In {
    const D* d;
    const unsigned *a, *b;
  };
  static CUEMU_UNCHECKED void resolve(Lane* lanes, unsigned) {
    constexpr int kDepth = 8 * kPerWord;
    Sum a[16][kDepth], b[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const In* in = static_cast<const In*>(lanes[lane].in);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < kPerWord; ++i) {
        const int k = kPerWord * t + i;
        for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][k + r / 2 * kDepth / 2] = Value()(in->a[r], i);
        for (int r = 0; r < 2; ++r) b[k + r * kDepth / 2][g] = Value()(in->b[r], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      D* d = static_cast<D*>(lanes[lane].out);
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        Sum sum = static_cast<Sum>(d[r]);
        for (int k = 0; k < kDepth; ++k) sum += a[g + r / 2 * 8][k] * b[k][2 * t + r % 2];
        d[r] = static_cast<D>(sum);
      }
    }
  }
  static void run(D* d, const unsigned* a, const unsigned* b, const char* name) {
    In in{d, a, b};
    cuemu_collective(kFullWarp, &in, d, &resolve, name, 0);
  }
};

struct Bf16Value {
  CUEMU_UNCHECKED double operator()(unsigned word, int i) const {
    return __uint_as_float(i ? word & 0xffff0000u : word << 16);
  }
};
struct S8Value {
  CUEMU_UNCHECKED unsigned operator()(unsigned word, int i) const {  // unsigned sums wrap around, as the hardware's do
    return static_cast<unsigned>(static_cast<int>(static_cast<signed char>(word >> 8 * i)));
  }
};
struct E4m3Value {
  CUEMU_UNCHECKED double operator()(unsigned word, int i) const {
    const unsigned code = word >> 8 * i & 255, exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 127) == 127) return __builtin_nan("");
    const double value = exponent ? ldexp(8 + mantissa, static_cast<int>(exponent) - 10) : ldexp(mantissa, -9);
    return code & 128 ? -value : value;
  }
};

struct Rows {
  const void* row[32];
};
struct GatherRows {
  CUEMU_UNCHECKED Rows operator()(const void* const* rows, unsigned, int) const {
    Rows all;
    for (int i = 0; i < 32; ++i) all.row[i] = rows[i];
    return all;
  }
};

template <int kMatrices>
void ldmatrix(unsigned (&r)[kMatrices], const void* row, bool transposed) {
  const int lane = cuemu_thread->lane, g = lane / 4, t = lane % 4;
  if (lane < 8 * kMatrices) {
    cuemu_require_shared(row, "ldmatrix of memory that is not shared");
    if (reinterpret_cast<uintptr_t>(row) % 16) cuemu_fail("misaligned ldmatrix");
  }
  const Rows rows = collective<Rows, GatherRows>(kFullWarp, row, "ldmatrix");
  for (int i = 0; i < kMatrices; ++i) {
    const auto value = [&](int j, int column) -> unsigned {
      return static_cast<const unsigned short*>(rows.row[8 * i + j])[column];
    };
    r[i] = transposed ? value(2 * t, g) | value(2 * t + 1, g) << 16 : value(g, 2 * t) | value(g, 2 * t + 1) << 16;
  }
}

// The destination is unknown from the issue on, and right only after the wait.
inline void issue_copy(void* shared, const void* global, unsigned bytes, unsigned valid) {
  cuemu_require_shared(shared, "cp.async to memory that is not shared");
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    cuemu_fail("misaligned cp.async");
  for (unsigned i = 0; i < bytes; ++i) static_cast<unsigned char*>(shared)[i] = 0xff;
  const AsyncCopy copy{shared, global, bytes, valid};
  cuemu_async_issue(&copy);
}

inline void land_copies(int pending) {
  AsyncCopy copy;
  while (cuemu_async_take(pending, &copy))
    for (unsigned i = 0; i < copy.bytes; ++i)
      static_cast<unsigned char*>(copy.to)[i] = i < copy.valid ? static_cast<const unsigned char*>(copy.from)[i] : 0;
}

}  // namespace cuemu

inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  cuemu::Mma<float, double, 2, cuemu::Bf16Value>::run(d, a, b, "mma_m16n8k16_bf16");
}
inline void mma_m16n8k32_s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  cuemu::Mma<int, unsigned, 4, cuemu::S8Value>::run(d, a, b, "mma_m16n8k32_s8");
}
inline void mma_m16n8k32_e4m3(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  cuemu::Mma<float, double, 4, cuemu::E4m3Value>::run(d, a, b, "mma_m16n8k32_e4m3");
}

inline void ldmatrix_x2(unsigned (&r)[2], const void* row) { cuemu::ldmatrix(r, row, false); }
inline void ldmatrix_x4(unsigned (&r)[4], const void* row) { cuemu::ldmatrix(r, row, false); }
inline void ldmatrix_x2_transposed(unsigned (&r)[2], const void* row) { cuemu::ldmatrix(r, row, true); }
inline void ldmatrix_x4_transposed(unsigned (&r)[4], const void* row) { cuemu::ldmatrix(r, row, true); }

template <int kBytes>
void cp_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  cuemu::issue_copy(shared, global, kBytes, kBytes);
}
template <int kBytes>
void cp_async_or_zero(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  cuemu::issue_copy(shared, global, kBytes, valid ? kBytes : 0);
}
inline void cp_async_commit() { cuemu::cuemu_async_commit(); }
template <int kPending>
void cp_async_wait() {
  cuemu::land_copies(kPending);
}

inline void named_barrier_sync(int id, int n_threads) {
  if (id < 1 || id > 15) cuemu::cuemu_fail("a named barrier has a number from 1 to 15");
  cuemu::cuemu_barrier(id, n_threads, 0, "a named barrier");
}
inline void named_barrier_arrive(int id, int n_threads) {
  if (id < 1 || id > 15) cuemu::cuemu_fail("a named barrier has a number from 1 to 15");
  cuemu::cuemu_barrier_arrive(id, n_threads);
}

inline void pdl_wait() { cuemu::cuemu_wait_predecessor(); }
inline void pdl_launch() {}

inline unsigned and_or(unsigned a, unsigned mask, unsigned other) { return (a & mask) | other; }
inline unsigned opaque(unsigned x) { return x; }

inline uint4 load_stream16(const void* p) { return cuemu::load(static_cast<const uint4*>(p)); }
inline uint2 load_stream8(const void* p) { return cuemu::load(static_cast<const uint2*>(p)); }
template <class T>
void expect_aligned(const T* p) {
  cuemu::check_aligned(p, "misaligned vector access");
}
inline void prefetch_l2(const void*) {}

inline unsigned cluster_rank() { return cuemu::cuemu_thread->cluster_rank; }
inline unsigned cluster_size() { return cuemu::cuemu_thread->cluster_size; }
inline void cluster_sync() { cuemu::cuemu_cluster_barrier(); }
template <class T>
T* cluster_map(T* shared, unsigned rank) {
  return static_cast<T*>(cuemu::cuemu_cluster_map(shared, rank));
}
