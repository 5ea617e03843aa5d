// Makes a CUDA C++ kernel file compile as C++ for the CPU, one fiber per CUDA thread. The builder includes this before
// the first line of every kernel file. What is emulated, and what is not: tests/cuemu/README.md.
#pragma once

#include <math.h>

#include <cassert>
#include <cstdio>
#include <type_traits>
#include <utility>

#include <vector_types.h>
#include <vector_functions.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp4.h>
#include <cuda_fp8.h>
#include <math_constants.h>

#include "cuemu/runtime.h"

#include "cuemu/core.h"

#include "cuemu/atomics.h"
#include "cuemu/collectives.h"
#include "cuemu/math.h"
#include "cuemu/memory.h"

#define __builtin_assume(condition) ((condition) ? (void)0 : cuemu::cuemu_fail("assumption failed: " #condition))

// Last, because <assert.h> redefines it at every inclusion.
#undef assert
#define assert(condition) ((condition) ? (void)0 : cuemu::cuemu_fail("assertion failed: " #condition))
