__device__ __forceinline__ uint4 load_stream16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
struct Nvfp4Tile {
  const unsigned char *codes, *scales;
  __device__ __forceinline__ uint4 load(int chunk) const {
    return load_stream16(codes + 16 * chunk);
  }
  __device__ __forceinline__ unsigned scale(int chunk) const {
    return reinterpret_cast<const unsigned short*>(scales)[chunk];
  }
};
