// Bytes of a stored KV row and of an indexer key (spec model.md 6.1, 6.2; torch twins in
// ds4/kernels/kv_publish/ref.py).
//
//   row   448 e4m3 | 7 e8m0, one per 64 columns | 0 | 64 bf16                     584 bytes, starts on 8
//   key   64 bytes of two e2m1, the even column low | 4 e8m0, one per 32 columns  68 bytes, starts on 4
#pragma once

constexpr int kHeadDim = 512;
constexpr int kRopeDim = 64;  // the last columns
constexpr int kNopeDim = kHeadDim - kRopeDim;
constexpr int kRowBlock = 64;
constexpr int kRowScales = kNopeDim;  // where they begin
constexpr int kRowRope = kRowScales + kNopeDim / kRowBlock + 1;
constexpr int kRowBytes = kRowRope + 2 * kRopeDim;

constexpr int kKeyDim = 128;
constexpr int kKeyBlock = 32;
constexpr int kKeyScales = kKeyDim / 2;
constexpr int kKeyBytes = kKeyScales + kKeyDim / kKeyBlock;

static_assert(kRowBytes == 584 && kRowRope % 8 == 0 && kRowBytes % 8 == 0, "the bf16 part is aligned to 8 bytes");
static_assert(kKeyBytes == 68, "keys are aligned to 4 bytes");
