/* From similarities to gradients of the logits: what the kernels of all architectures do to a tile of products. */
#ifndef COSMOS_INFONCE_GRADIENT_H
#define COSMOS_INFONCE_GRADIENT_H

#include "infonce_backward.h"

namespace cosmos {

/* fp16 has no room below 6e-5 for small probabilities: g is kept times 2^14 (|g| <= 2), bf16 needs nothing. */
template <Dtype kType>
constexpr float kGradientUnit = kType == Dtype::kHalf ? 16384.0f : 1.0f;

/* Differences of log2-sum-exps in a tile up to which one exponential serves both directions; see gradient_factors. */
constexpr float kSharedRange = 60.0f;

template <int kRows, int kColumns>
struct GradientFactors {
  float row[kRows], column[kColumns];
};

__device__ __forceinline__ float finite_or_low(float x) { return x < INFINITY ? x : -INFINITY; }

/* exp(s - row_lse) + exp(s - col_lse) = 2^(s' - t) (2^(t - r) + 2^(t - c)), with s', r, c in units of log2 and t the
 * largest r or c of the tile: as s' <= min(r, c), nothing overflows, and what the first factor loses below 2^-126 is
 * below 2^-66 as long as no r or c is kSharedRange smaller than t. Else each term takes its own exponential.
 * An infinite r or c is a term that does not exist: its factor is 0 either way.
 * Leaves the two factors, or r and c, in `factors`, times the gradient's unit; returns t, or NaN for "own exponentials".
 * Called by kThreads threads, `thread` of them; `sync()` is a barrier of theirs. */
template <Dtype kType, int kThreads, int kRows, int kColumns, typename Sync>
__device__ __forceinline__ float gradient_factors(GradientFactors<kRows, kColumns>& factors, const InfoncePlan& plan,
                                                  ViewTile row, ViewTile column, int thread, const Sync& sync) {
  const CosmosInfonceShape& shape = plan.shape;
  const int lane = thread & 31;
  /* Beyond the ragged end: the last one again, which changes neither maximum nor minimum. */
  for (int i = thread; i < kRows; i += kThreads) {
    const int64_t at = row.first + least(i, shape.rows - row.first - 1);
    factors.row[i] = kLog2e * plan.tensors.row_lse[(row.view * shape.rows + at) * shape.column_views + column.view];
  }
  for (int j = thread; j < kColumns; j += kThreads) {
    const int64_t at = column.first + least(j, shape.columns - column.first - 1);
    factors.column[j] =
        kLog2e * plan.tensors.col_lse[(row.view * shape.column_views + column.view) * shape.columns + at];
  }
  sync();
  float high = -INFINITY, low = INFINITY;
#pragma unroll
  for (int i = lane; i < kRows; i += 32) {
    high = fmaxf(high, finite_or_low(factors.row[i]));
    low = fminf(low, factors.row[i]);
  }
#pragma unroll
  for (int j = lane; j < kColumns; j += 32) {
    high = fmaxf(high, finite_or_low(factors.column[j]));
    low = fminf(low, factors.column[j]);
  }
  high = lanes_max<32>(high);
  low = lanes_min<32>(low);
  sync(); /* all have read before any writes */
  const bool shared = high - low <= kSharedRange;
  if (shared) {
    for (int i = thread; i < kRows; i += kThreads)
      factors.row[i] = kGradientUnit<kType> * exp2_fast(high - factors.row[i]);
    for (int j = thread; j < kColumns; j += kThreads)
      factors.column[j] = kGradientUnit<kType> * exp2_fast(high - factors.column[j]);
  }
  sync();
  return shared ? high : NAN;
}

/* Turns products into g, times the gradient's unit. */
template <Dtype kType>
struct GradientOfLogits {
  float scale, shift;  /* of the logits, in log2; shift: as gradient_factors returned it */
  int diagonal;        /* column - row of the positives, within the tile */
  int rows, columns;   /* that exist */

  __device__ __forceinline__ GradientOfLogits(const InfoncePlan& plan, float shift_, ViewTile row, ViewTile column,
                                              int rows_, int columns_)
      : scale(kLog2e * *plan.tensors.scale), shift(shift_),
        diagonal(static_cast<int>(plan.shape.offset + row.first - column.first)), rows(rows_), columns(columns_) {}

  __device__ __forceinline__ float operator()(float product, float row_factor, float column_factor, int i,
                                              int j) const {
    const float s = scale * product;
    float g = shift == shift ? exp2_fast(s - shift) * (row_factor + column_factor)
                             : kGradientUnit<kType> * (exp2_fast(s - row_factor) + exp2_fast(s - column_factor));
    if (j - i == diagonal) g -= 2.0f * kGradientUnit<kType>;
    return i < rows && j < columns ? g : 0.0f;
  }
};

/* Adds two neighbouring sums of g times features to a gradient, or starts it. */
template <Dtype kType>
__device__ __forceinline__ void add_pair(float* to, float first, float second, bool start) {
  float2 total = start ? float2{0.0f, 0.0f} : *reinterpret_cast<const float2*>(to);
  total.x += first * (1.0f / kGradientUnit<kType>);
  total.y += second * (1.0f / kGradientUnit<kType>);
  *reinterpret_cast<float2*>(to) = total;
}

}  // namespace cosmos

#endif /* COSMOS_INFONCE_GRADIENT_H */
