/* Device primitives of compute capability 9.0: warpgroup products from shared memory, barriers in shared memory.
 *
 * Operands lie in shared memory in lines of 128 bytes; eight lines are one swizzled atom of 1024 bytes, aligned to its
 * size, in which 16-byte chunk c of line l stands at chunk c ^ (l % 8). Along k, a line is 64 steps of k of one row;
 * across k, it is 64 rows of one step of k.
 */
#ifndef COSMOS_DEVICE_SM90_H
#define COSMOS_DEVICE_SM90_H

#include "device.h"

namespace cosmos {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kSm90 = true;
#else
constexpr bool kSm90 = false; /* compiled for another architecture: kernels of this file's users are empty there */
#endif

constexpr int kAtomBytes = 1024;

/* Descriptor of an operand of a warpgroup product that begins at shared address `start`. Along k: groups of eight rows
 * are `group_bytes` apart, `block_bytes` is ignored. Across k: groups of eight steps of k are `group_bytes` apart, blocks
 * of 64 rows `block_bytes`. */
COSMOS_INLINE uint64_t operand_descriptor(uint32_t start, uint32_t group_bytes, uint32_t block_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((start & 0x3ffff) >> 4) | static_cast<uint64_t>((block_bytes & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((group_bytes & 0x3ffff) >> 4) << 32 | kSwizzle128 << 62;
}

}  // namespace cosmos

#ifdef COSMOS_EMULATE
#include "emulation/primitives_sm90.h"
#else

namespace cosmos {

/* A barrier of `count` arrivals a phase; phases alternate between parity 0 and 1. */
__device__ __forceinline__ void barrier_start(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barriers_started() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" :: "r"(shared_address(barrier))
               : "memory");
}
/* Waits until the phase of that parity is complete. */
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\nbra again;\nover:\n}"
      :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}

/* Barrier of kThreads threads that use the same number, 1 to 15. */
template <int kNumber, int kThreads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync %0, %1;" :: "n"(kNumber), "n"(kThreads) : "memory");
}

/* What this thread has written to shared memory becomes visible to products that start later. */
__device__ __forceinline__ void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(kRegisters));
}

/* Around products: before the first, after a group of them, until at most kPending groups are under way. */
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(kPending) : "memory");
}

#define COSMOS_SUMS_8(i)                                                                                            \
  "+f"(sums[i]), "+f"(sums[(i) + 1]), "+f"(sums[(i) + 2]), "+f"(sums[(i) + 3]), "+f"(sums[(i) + 4]),                  \
      "+f"(sums[(i) + 5]), "+f"(sums[(i) + 6]), "+f"(sums[(i) + 7])
#define COSMOS_SUMS_32(i) COSMOS_SUMS_8(i), COSMOS_SUMS_8((i) + 8), COSMOS_SUMS_8((i) + 16), COSMOS_SUMS_8((i) + 24)
#define COSMOS_WARPGROUP_PRODUCT(type)                                                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"                                    \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
               "%128, %129, 1, 1, 1, %130, %131;"                                                                   \
               : COSMOS_SUMS_32(0), COSMOS_SUMS_32(32), COSMOS_SUMS_32(64), COSMOS_SUMS_32(96)                       \
               : "l"(left), "l"(right), "n"(kLeftAcross ? 1 : 0), "n"(kRightAcross ? 1 : 0))

/* sums[64 x 256] += left[64 x 16] right[16 x 256] by a warpgroup, asynchronously. Of thread t of the warpgroup, with
 * g = t % 32 / 4: sums[4 n + e] is row 16 (t / 32) + g + 8 (e / 2), column 8 n + 2 (t % 4) + e % 2. */
template <Dtype kType, bool kLeftAcross, bool kRightAcross>
__device__ __forceinline__ void warpgroup_product(float (&sums)[128], uint64_t left, uint64_t right) {
  if constexpr (kType == Dtype::kHalf) {
    COSMOS_WARPGROUP_PRODUCT("f16");
  } else {
    COSMOS_WARPGROUP_PRODUCT("bf16");
  }
}
#undef COSMOS_WARPGROUP_PRODUCT
#undef COSMOS_SUMS_32
#undef COSMOS_SUMS_8

}  // namespace cosmos

#endif /* COSMOS_EMULATE */

#endif /* COSMOS_DEVICE_SM90_H */
