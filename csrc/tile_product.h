/* A 128 x 128 tile of a matrix product on sm_80 tensor cores: cp.async, four stages, ldmatrix, mma.sync, fp32 sums.
 *
 * 128 threads: four warps of 64 x 64 each. Steps of 32 along k.
 */
#ifndef COSMOS_TILE_PRODUCT_H
#define COSMOS_TILE_PRODUCT_H

#include "strip.h"

namespace cosmos {

constexpr int kTile = 128;
constexpr int kStep = 32; /* along k */
constexpr int kStages = 4;
constexpr int kTileThreads = 128;
constexpr int kStripBytes = kTile * kStep * 2;
constexpr int kProductBytes = kStages * 2 * kStripBytes; /* of shared memory: 64 KiB, two blocks on a multiprocessor */

/* Offset in bytes of 16-byte chunk `chunk` of row `row`: the chunks of eight rows that ldmatrix reads at once lie in
 * different banks. Rows are 64 bytes along k, 256 bytes across k. */
template <Layout kLayout>
__device__ __forceinline__ int strip_offset(int row, int chunk) {
  if constexpr (kLayout == Layout::kAlongK) return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
  return row * 256 + ((chunk ^ (row & 7)) << 4);
}

template <Layout kLayout>
__device__ __forceinline__ void load_strip(unsigned char* shared, const Strip& strip, int64_t stride) {
  constexpr int kChunks = (kLayout == Layout::kAlongK ? kStep : kTile) / 8; /* in a row */
#pragma unroll
  for (int part = 0; part < kTile * kStep / 8 / kTileThreads; ++part) {
    const int index = part * kTileThreads + static_cast<int>(threadIdx.x);
    const int row = index / kChunks, chunk = index % kChunks;
    const bool valid = row < strip.rows && chunk * 8 < strip.width;
    const uint16_t* from = valid ? strip.origin + row * stride + chunk * 8 : strip.origin;
    copy_async(shared + strip_offset<kLayout>(row, chunk), from, valid);
  }
}

/* 16 rows from `row` on and 16 steps from `k` on of the left operand, as multiply_add wants them. */
template <Layout kLayout>
__device__ __forceinline__ void load_left(uint32_t (&out)[4], const unsigned char* shared, int row, int k) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if constexpr (kLayout == Layout::kAlongK) {
    load_matrices(out, shared + strip_offset<kLayout>(row + (lane & 15), (k >> 3) + (lane >> 4)));
  } else {
    const int at_k = k + ((lane >> 4) << 3) + (lane & 7);
    load_matrices_transposed(out, shared + strip_offset<kLayout>(at_k, (row >> 3) + ((lane >> 3) & 1)));
  }
}

/* 16 columns from `column` on of the right operand: out[0], out[1] for the first eight, out[2], out[3] for the rest. */
template <Layout kLayout>
__device__ __forceinline__ void load_right(uint32_t (&out)[4], const unsigned char* shared, int column, int k) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if constexpr (kLayout == Layout::kAlongK) {
    const int at = column + ((lane >> 4) << 3) + (lane & 7);
    load_matrices(out, shared + strip_offset<kLayout>(at, (k >> 3) + ((lane >> 3) & 1)));
  } else {
    const int at_k = k + (((lane >> 3) & 1) << 3) + (lane & 7);
    load_matrices_transposed(out, shared + strip_offset<kLayout>(at_k, (column >> 3) + (lane >> 4)));
  }
}

/* One warp's 64 x 64 part of the tile. */
struct TileSums {
  float value[4][8][4] = {};

  __device__ __forceinline__ static int first_row() { return (static_cast<int>(threadIdx.x) >> 6) * 64; }
  __device__ __forceinline__ static int first_column() { return ((static_cast<int>(threadIdx.x) >> 5) & 1) * 64; }
  /* Row and column in the tile of value[m][n][e]; e and e + 1 of an even e are neighbours in a row. */
  __device__ __forceinline__ static int row(int m, int e) {
    return first_row() + m * 16 + ((static_cast<int>(threadIdx.x) & 31) >> 2) + (e >> 1) * 8;
  }
  __device__ __forceinline__ static int column(int n, int e) {
    return first_column() + n * 8 + (static_cast<int>(threadIdx.x) & 3) * 2 + (e & 1);
  }
};

template <Dtype kType, Layout kLeft, Layout kRight>
__device__ __forceinline__ void multiply_stage(TileSums& sums, const unsigned char* left, const unsigned char* right) {
#pragma unroll
  for (int k = 0; k < kStep; k += 16) {
    uint32_t a[4][4], b[4][4];
#pragma unroll
    for (int m = 0; m < 4; ++m) load_left<kLeft>(a[m], left, TileSums::first_row() + m * 16, k);
#pragma unroll
    for (int n = 0; n < 4; ++n) load_right<kRight>(b[n], right, TileSums::first_column() + n * 16, k);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n)
        multiply_add<kType>(sums.value[m][n], a[m], b[n >> 1][(n & 1) * 2], b[n >> 1][(n & 1) * 2 + 1]);
    }
  }
}

/* Sums over `steps` steps of the products of left(step) and right(step), two functions that return Strips. At the end
 * shared memory is free again for all threads. */
template <Dtype kType, Layout kLeft, Layout kRight, typename Left, typename Right>
__device__ __forceinline__ void tile_product(TileSums& sums, int steps, const Left& left, int64_t left_stride,
                                             const Right& right, int64_t right_stride) {
  unsigned char* shared = shared_memory();
  const auto load = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + (step % kStages) * (2 * kStripBytes);
      load_strip<kLeft>(stage, left(step), left_stride);
      load_strip<kRight>(stage + kStripBytes, right(step), right_stride);
    }
    commit_copies(); /* an empty group keeps the count of groups right */
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads(); /* this stage has arrived for all, and none still reads the one to be filled */
    load(step + kStages - 1);
    const unsigned char* stage = shared + (step % kStages) * (2 * kStripBytes);
    multiply_stage<kType, kLeft, kRight>(sums, stage, stage + kStripBytes);
  }
  wait_copies<0>();
  __syncthreads();
}

}  // namespace cosmos

#endif /* COSMOS_TILE_PRODUCT_H */
