/* What the pooling's kernels share: tiles of one sample in shared memory, their products, sums across warps.
 *
 * A block has up to 64 rows of one sample and all of its tokens, and streams D in chunks of 64. Sums of rows x tokens
 * and of rows x channels are spread alike over eight warps: two along the rows, four along the rest.
 */
#ifndef COSMOS_POOL_TILE_H
#define COSMOS_POOL_TILE_H

#include "device.h"

namespace cosmos {
namespace pool {

constexpr int kRows = 64;
constexpr int kChunk = 64; /* of D: rows of 128 bytes in shared memory */
constexpr int kThreads = 256; /* eight warps: two along the rows, four along tokens or channels */


/* Offset of 16-byte chunk `chunk` of a row of kBytes: the eight rows that ldmatrix reads at once hit all banks. */
template <int kBytes>
__device__ __forceinline__ int row_offset(int row, int chunk) {
  return row * kBytes + ((chunk ^ (row & 7)) << 4);
}

template <int kCount>
__device__ __forceinline__ void load_rows(unsigned char* shared, const uint16_t* from, int64_t stride, int rows,
                                          int width) {
#pragma unroll
  for (int part = 0; part < kCount * 8 / kThreads; ++part) {
    const int index = part * kThreads + static_cast<int>(threadIdx.x), row = index >> 3, chunk = index & 7;
    const bool valid = row < rows && chunk * 8 < width;
    copy_async(shared + row_offset<128>(row, chunk), valid ? from + row * stride + chunk * 8 : from, valid);
  }
}

template <Dtype kType>
__device__ __forceinline__ void unpack8(float (&out)[8], const unsigned char* at) {
  const uint4 bits = *reinterpret_cast<const uint4*>(at);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<kType>(words[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

template <Dtype kType>
__device__ __forceinline__ float row_sum(const unsigned char* shared, int row, int chunks) {
  float sum = 0.0f;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    float x[8];
    unpack8<kType>(x, shared + row_offset<128>(row, chunk));
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[i];
  }
  return sum;
}

/* Mean and sum of squared deviations of one token, merged chunk by chunk: exact for tokens far from zero too. */
struct Moments {
  float mean = 0.0f, squares = 0.0f;

  template <Dtype kType>
  __device__ __forceinline__ void add(const unsigned char* shared, int row, int seen, int count) {
    const float own = row_sum<kType>(shared, row, count / 8) / static_cast<float>(count);
    float own_squares = 0.0f;
    for (int chunk = 0; chunk < count / 8; ++chunk) {
      float x[8];
      unpack8<kType>(x, shared + row_offset<128>(row, chunk));
#pragma unroll
      for (int i = 0; i < 8; ++i) own_squares += (x[i] - own) * (x[i] - own);
    }
    const float before = static_cast<float>(seen), now = static_cast<float>(count), delta = own - mean;
    mean += delta * (now / (before + now));
    squares += own_squares + delta * delta * (before * now / (before + now));
  }
};

/* Sums of a warp over 32 rows and kTiles * 8 columns; element (m, n, e) lies at row(m, e), n * 8 + column(e). */
template <int kTiles>
struct WarpSums {
  float value[2][kTiles][4] = {};
  __device__ __forceinline__ static int row(int m, int e) {
    return (static_cast<int>(threadIdx.x) >> 7) * 32 + m * 16 + ((static_cast<int>(threadIdx.x) & 31) >> 2) +
           (e >> 1) * 8;
  }
  __device__ __forceinline__ static int column(int e) { return (static_cast<int>(threadIdx.x) & 3) * 2 + (e & 1); }
};

__device__ __forceinline__ int warp_row() { return (static_cast<int>(threadIdx.x) >> 7) * 32; }
__device__ __forceinline__ int warp_column() { return (static_cast<int>(threadIdx.x) >> 5) & 3; } /* of four */

/* Four fragments of 16 x 16 from rows of kBytes, for multiply_add's left side. */
template <int kBytes>
__device__ __forceinline__ void left_fragment(uint32_t (&out)[4], const unsigned char* shared, int row, int k) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  load_matrices(out, shared + row_offset<kBytes>(row + (lane & 15), (k >> 3) + (lane >> 4)));
}

/* scores += queries tokens^T over one chunk of D. */
template <Dtype kType, int kTiles>
__device__ __forceinline__ void add_scores(WarpSums<kTiles>& sums, const unsigned char* queries,
                                           const unsigned char* tokens) {
  const int lane = static_cast<int>(threadIdx.x) & 31, first = warp_column() * kTiles * 8;
#pragma unroll
  for (int k = 0; k < kChunk; k += 16) {
    uint32_t a[2][4];
    left_fragment<128>(a[0], queries, warp_row(), k);
    left_fragment<128>(a[1], queries, warp_row() + 16, k);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      const int token = first + n * 8 + ((lane >> 4) << 3) + (lane & 7);
      load_matrices(b, tokens + row_offset<128>(token, (k >> 3) + ((lane >> 3) & 1)));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_add<kType>(sums.value[m][n], a[m], b[0], b[1]);
        multiply_add<kType>(sums.value[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/* One number a row from four warps: `value[m][half]` of the row's lanes, already alike in its four lanes. */
__device__ __forceinline__ void put_part(float (*part)[kRows], const float (&value)[2][2]) {
  if ((threadIdx.x & 3) != 0) return;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    part[warp_column()][WarpSums<2>::row(m, 0)] = value[m][0];
    part[warp_column()][WarpSums<2>::row(m, 2)] = value[m][1];
  }
}
__device__ __forceinline__ float part_max(const float (*part)[kRows], int row) {
  return fmaxf(fmaxf(part[0][row], part[1][row]), fmaxf(part[2][row], part[3][row]));
}
__device__ __forceinline__ float part_sum(const float (*part)[kRows], int row) {
  return (part[0][row] + part[1][row]) + (part[2][row] + part[3][row]);
}

/* Products of weights [64, kTokens] and a chunk of the tokens: 32 rows x 16 channels a warp. */
template <Dtype kType, int kTokens>
__device__ __forceinline__ void add_weighted(WarpSums<2>& sums, const unsigned char* weights,
                                             const unsigned char* tokens) {
  const int lane = static_cast<int>(threadIdx.x) & 31, first = warp_column() * 16;
#pragma unroll 4
  for (int k = 0; k < kTokens; k += 16) {
    uint32_t b[4];
    load_matrices_transposed(
        b, tokens + row_offset<128>(k + (((lane >> 3) & 1) << 3) + (lane & 7), (first >> 3) + (lane >> 4)));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t a[4];
      left_fragment<kTokens * 2>(a, weights, warp_row() + m * 16, k);
      multiply_add<kType>(sums.value[m][0], a, b[0], b[1]);
      multiply_add<kType>(sums.value[m][1], a, b[2], b[3]);
    }
  }
}

/* (sums - offset) * factor of every row, to `rows` rows and `width` channels of `out`. */
template <Dtype kType>
__device__ __forceinline__ void store_rows(const WarpSums<2>& sums, const float (&offset)[2][2],
                                           const float (&factor)[2][2], uint16_t* out, int64_t dim, int rows,
                                           int width) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int row = WarpSums<2>::row(m, e);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int column = warp_column() * 16 + n * 8 + WarpSums<2>::column(0);
        if (row < rows && column < width)
          *reinterpret_cast<uint32_t*>(out + row * dim + column) =
              pack<kType>((sums.value[m][n][e] - offset[m][e >> 1]) * factor[m][e >> 1],
                          (sums.value[m][n][e + 1] - offset[m][e >> 1]) * factor[m][e >> 1]);
      }
    }
  }
}

}  // namespace pool
}  // namespace cosmos

#endif /* COSMOS_POOL_TILE_H */
