/* A 128 x 256 tile of a matrix product on sm_90a: one warpgroup loads, two multiply (wgmma), four stages of 64 along k.
 *
 * Loads are cp.async into the swizzled layout that
 * wgmma reads; a stage passes from the loader to the multipliers and back by barriers in shared memory.
 */
#ifndef COSMOS_WARPGROUP_TILE_H
#define COSMOS_WARPGROUP_TILE_H

#include "device_sm90.h"
#include "strip.h"

namespace cosmos {
namespace sm90 {

constexpr int kLeftRows = 128;
constexpr int kRightRows = 256;
constexpr int kStep = 64; /* along k: a line of 128 bytes */
constexpr int kStages = 4;
constexpr int kThreads = 384;
constexpr int kMultipliers = 256;
constexpr int kLag = 2; /* steps between issuing a load and passing it on */
constexpr int kLeftBytes = kLeftRows * kStep * 2;
constexpr int kRightBytes = kRightRows * kStep * 2;
constexpr int kStageBytes = kLeftBytes + kRightBytes;
constexpr int kBlockBytes = 64 * kStep * 2; /* 64 rows of either operand, in either layout */

/* What the barriers of a stage say: it is full (every loader has arrived), it is empty (every multiplying warp has). */
struct Barriers {
  uint64_t full[kStages], empty[kStages];

  /* By all threads of the block, before anything else. */
  __device__ __forceinline__ void start() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_start(&full[stage], kThreads - kMultipliers);
        barrier_start(&empty[stage], kMultipliers / 32);
      }
      barriers_started();
    }
    __syncthreads();
  }
};

/* By the 128 loading threads. A thread keeps to one chunk of the strip's rows, so that a copy costs few registers. */
template <Layout kLayout, int kRows>
__device__ __forceinline__ void load_operand(unsigned char* shared, const Strip& strip, int64_t stride) {
  constexpr int kChunks = (kLayout == Layout::kAlongK ? kStep : kRows) / 8; /* in a row of the strip */
  constexpr int kLines = (kThreads - kMultipliers) / kChunks;               /* rows of the strip at a time */
  constexpr int kAllLines = kLayout == Layout::kAlongK ? kRows : kStep;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks, first = static_cast<int>(threadIdx.x) / kChunks;
  const int rows = chunk * 8 < strip.width ? strip.rows : 0;
  const uint16_t* from = strip.origin + first * stride + chunk * 8;
  unsigned char* to = shared + (kLayout == Layout::kAlongK ? 0 : chunk / 8 * kBlockBytes);
#pragma unroll
  for (int line = first; line < first + kAllLines; line += kLines) {
    const bool valid = line < rows;
    copy_async(to + line * 128 + (((chunk & 7) ^ (line & 7)) << 4), valid ? from : strip.origin, valid);
    from += kLines * stride;
  }
}

/* The loading warpgroup, threads 0 to 127. */
template <Layout kLeft, Layout kRight, typename Left, typename Right>
__device__ __forceinline__ void load_tile(Barriers& barriers, int steps, const Left& left, int64_t left_stride,
                                          const Right& right, int64_t right_stride) {
  const auto pass_on = [&](int step) {
    publish_to_products();
    barrier_arrive(&barriers.full[step % kStages]);
  };
  for (int step = 0; step < steps; ++step) {
    if (step >= kStages) barrier_wait(&barriers.empty[step % kStages], (step / kStages - 1) & 1);
    unsigned char* stage = shared_memory() + step % kStages * kStageBytes;
    load_operand<kLeft, kLeftRows>(stage, left(step), left_stride);
    load_operand<kRight, kRightRows>(stage + kLeftBytes, right(step), right_stride);
    commit_copies();
    if (step >= kLag) {
      wait_copies<kLag>();
      pass_on(step - kLag);
    }
  }
  wait_copies<0>();
  for (int step = steps < kLag ? 0 : steps - kLag; step < steps; ++step) pass_on(step);
}

/* One warpgroup's 64 x 256 part of the tile. */
struct Sums {
  float value[128] = {};
  /* Row and column in the tile of value[4 n + e]; e and e + 1 of an even e are neighbours in a row. */
  __device__ __forceinline__ static int row(int e) {
    const int thread = static_cast<int>(threadIdx.x) - (kThreads - kMultipliers);
    return (thread >> 5) * 16 + ((thread & 31) >> 2) + (e >> 1) * 8;
  }
  __device__ __forceinline__ static int column(int n, int e) {
    return n * 8 + (static_cast<int>(threadIdx.x) & 3) * 2 + (e & 1);
  }
};

/* The multiplying warpgroups, threads 128 to 383. At the end shared memory is free for them. */
template <Dtype kType, Layout kLeft, Layout kRight>
__device__ __forceinline__ void multiply_tile(Sums& sums, Barriers& barriers, int steps) {
  constexpr bool kLeftAcross = kLeft == Layout::kAcrossK, kRightAcross = kRight == Layout::kAcrossK;
  constexpr uint32_t kLeftAdvance = kLeftAcross ? 2 * kAtomBytes : 32, kRightAdvance = kRightAcross ? 2 * kAtomBytes : 32;
  const uint32_t shared = shared_address(shared_memory());
  const uint32_t own = (threadIdx.x / 128 - 1) * kBlockBytes; /* this warpgroup's 64 rows of the left operand */
  const auto release = [&](int step) {
    if ((threadIdx.x & 31) == 0) barrier_arrive(&barriers.empty[step % kStages]);
  };
  for (int step = 0; step < steps; ++step) {
    barrier_wait(&barriers.full[step % kStages], step / kStages & 1);
    const uint32_t stage = shared + static_cast<uint32_t>(step % kStages * kStageBytes);
    products_begin();
#pragma unroll
    for (uint32_t k = 0; k < kStep / 16; ++k)
      warpgroup_product<kType, kLeftAcross, kRightAcross>(
          sums.value, operand_descriptor(stage + own + k * kLeftAdvance, kAtomBytes, kBlockBytes),
          operand_descriptor(stage + kLeftBytes + k * kRightAdvance, kAtomBytes, kBlockBytes));
    products_commit();
    products_wait<1>();
    if (step > 0) release(step - 1);
  }
  products_wait<0>();
  sync_threads<1, kMultipliers>();
}

}  // namespace sm90
}  // namespace cosmos

#endif /* COSMOS_WARPGROUP_TILE_H */
