/* Device primitives of the tensor-core kernels, as thin as can be: one function an instruction.
 *
 * Elements of 16 bits travel as uint16_t, two of them as one uint32_t (the lower half first). Compiled for a GPU the
 * functions are inline PTX (sm_80 and later); compiled for the host with COSMOS_EMULATE they come from emulation/, with
 * the same contracts, so that the kernels' own sources run on a CPU in the tests.
 */
#ifndef COSMOS_DEVICE_H
#define COSMOS_DEVICE_H

#include "cosmos.h"

namespace cosmos {

enum class Dtype : int32_t { kHalf = 0, kBfloat16 = 1 };

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

}  // namespace cosmos

#ifdef COSMOS_EMULATE
#include "emulation/primitives.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cosmos {

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

/* Ends the kernel with an error. */
__device__ __forceinline__ void refuse() { __trap(); }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <Dtype kType>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (kType == Dtype::kHalf) {
    const __half2 pair = __floats2half2_rn(low, high);
    bits = reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    bits = reinterpret_cast<const uint32_t&>(pair);
  }
  return bits;
}

template <Dtype kType>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (kType == Dtype::kHalf) return __half22float2(reinterpret_cast<const __half2&>(bits));
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits));
}

/* 2^x, relative error 2^-22; NaN for NaN, 0 below -126. */
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/* 16 bytes from global to shared memory, asynchronously; zeros, and nothing read, where not valid. */
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until at most kPending of this thread's latest groups are under way. */
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" :: "n"(kPending) : "memory");
}

/* Four 8 x 8 matrices; lane l names row l % 8 of matrix l / 8 and receives, of each matrix, row l / 4, elements
 * 2 (l % 4) and the next. Transposed: column l / 4 instead. */
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
}

/* c[16 x 8] += a[16 x 16] b[16 x 8], fp32 accumulation. With g = lane / 4, t = lane % 4:
 * a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right neighbour; b: (k = 2t, n = g), (2t + 8, g),
 * each with its lower neighbour; c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). */
template <Dtype kType>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kType == Dtype::kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ float shuffle_xor(float value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

}  // namespace cosmos

#endif /* COSMOS_EMULATE */

namespace cosmos {

/* Maximum, minimum and sum over the lanes of a warp whose numbers differ in the bits below kLanes. */
template <int kLanes>
__device__ __forceinline__ float lanes_max(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = fmaxf(value, shuffle_xor(value, step));
  return value;
}
template <int kLanes>
__device__ __forceinline__ float lanes_min(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = fminf(value, shuffle_xor(value, step));
  return value;
}
template <int kLanes>
__device__ __forceinline__ float lanes_sum(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += shuffle_xor(value, step);
  return value;
}

}  // namespace cosmos

#endif /* COSMOS_DEVICE_H */
