/* One head of one sequence: its scores fit the cache, so nothing is tiled, and nothing but the log-sum-exp of each row
 * is kept for the backward pass. Compiled once for each COSMOS_ISA: no function here may be one that the linker could
 * take from another object, so that all helpers are inlined and nothing of the C++ library is used.
 */
#include <math.h>

#include "attention_cpu.h"
#include "small_products.h"

namespace cosmos {
namespace COSMOS_ISA {

namespace {

/* One head of one sequence: n queries, m keys. */
struct Head {
  const float *q, *k, *v;
  int64_t n, m, first_query, first_key, channel;
};

COSMOS_INLINE Head head_of(const CosmosAttention& a, int64_t task) {
  const int64_t sequence = task / a.heads, channel = task % a.heads * a.width;
  const int64_t query = a.cu_queries[sequence], key = a.cu_keys[sequence];
  return {a.q + query * a.q_row + channel,
          a.k + key * a.k_row + channel,
          a.v + key * a.v_row + channel,
          a.cu_queries[sequence + 1] - query,
          a.cu_keys[sequence + 1] - key,
          query,
          key,
          channel};
}

COSMOS_INLINE int64_t seen_by(const CosmosAttention& a, const Head& head, int64_t query) {
  return a.causal ? head.m - head.n + query + 1 : head.m;
}

/* out [n, round_up(m)] <- x [n, width] y^T, y [m, width]; x are queries or their gradients, y keys or values. */
COSMOS_INLINE void by_keys(const CosmosAttention& a, const Head& head, const float* x, int64_t x_row, const float* y,
                           int64_t y_row, const AttentionRoom& room, float* out) {
  if (head.n == 1) return dots(y, y_row, head.m, a.width, x, out);
  const int64_t row = round_up(head.m);
  transpose(y, y_row, head.m, a.width, room.columns);
  product({x, x_row, 1}, room.columns, row, out, row, head.n, row, a.width);
}

/* Rounded here, once, for both directions: were `scale x - shift` fused, the largest score would come out above its own
 * shift by what rounding took off. */
COSMOS_INLINE void scale_row(float* x, int64_t row, float scale) {
  for (int64_t j = 0; j < row; j += kLanes) store(x + j, load(x + j) * fill(scale));
}

/* x[0..row) <- e^(x - shift) over the first `seen`, 0 behind them. */
COSMOS_INLINE void exponentiate(float* x, int64_t seen, int64_t row, float shift) {
  for (int64_t j = 0; j < row; j += kLanes)
    store(x + j, j < seen ? exp_of_negative(load(x + j) - fill(shift)) : Vec{});
  for (int64_t j = seen; j < round_up(seen); ++j) x[j] = 0.0f;
}

COSMOS_INLINE float total(const float* x, int64_t n) {
  Vec sums = {};
  for (int64_t j = 0; j < n; j += kLanes) sums += load(x + j);
  return sum(sums);
}

}  // namespace

void forward_head(const CosmosAttention& a, int64_t task, const AttentionRoom& room, float* out, float* lse) {
  const Head head = head_of(a, task);
  const int64_t row = round_up(head.m), out_row = a.heads * a.width;
  by_keys(a, head, head.q, a.q_row, head.k, a.k_row, room, room.weights);
  for (int64_t i = 0; i < head.n; ++i) {
    float* weights = room.weights + i * row;
    const int64_t seen = seen_by(a, head, i);
    scale_row(weights, row, a.scale);
    const float shift = largest(weights, seen);
    exponentiate(weights, seen, row, shift);
    const float norm = total(weights, row);
    const Vec share = fill(1.0f / norm);
    for (int64_t j = 0; j < row; j += kLanes) store(weights + j, load(weights + j) * share);
    lse[(head.first_query + i) * a.heads + task % a.heads] = shift + logf(norm);
  }
  float* rows = out + head.first_query * out_row + head.channel;
  product({room.weights, row, 1}, head.v, a.v_row, rows, out_row, head.n, a.width, head.m);
}

void backward_head(const CosmosAttention& a, const CosmosAttentionGrads& g, int64_t task, const AttentionRoom& room) {
  const Head head = head_of(a, task);
  const int64_t row = round_up(head.m);
  const float* grad = g.grad_out + head.first_query * g.grad_row + head.channel;
  by_keys(a, head, head.q, a.q_row, head.k, a.k_row, room, room.weights);
  for (int64_t i = 0; i < head.n; ++i) {
    const float lse = g.lse[(head.first_query + i) * a.heads + task % a.heads];
    scale_row(room.weights + i * row, row, a.scale);
    exponentiate(room.weights + i * row, seen_by(a, head, i), row, lse);
  }
  float* dv = g.dv + head.first_key * g.dv_row + head.channel;
  product({room.weights, 1, row}, grad, g.grad_row, dv, g.dv_row, head.m, a.width, head.n);
  by_keys(a, head, grad, g.grad_row, head.v, a.v_row, room, room.slopes);
  for (int64_t i = 0; i < head.n; ++i) { /* dS = P (dP - sum_j P dP) scale */
    float *slopes = room.slopes + i * row, *weights = room.weights + i * row;
    Vec sums = {};
    for (int64_t j = 0; j < row; j += kLanes) sums += load(slopes + j) * load(weights + j);
    const Vec mean = fill(sum(sums)), scale = fill(a.scale);
    for (int64_t j = 0; j < row; j += kLanes)
      store(slopes + j, load(weights + j) * (load(slopes + j) - mean) * scale);
  }
  float* dq = g.dq + head.first_query * g.dq_row + head.channel;
  float* dk = g.dk + head.first_key * g.dk_row + head.channel;
  product({room.slopes, row, 1}, head.k, a.k_row, dq, g.dq_row, head.n, a.width, head.m);
  product({room.slopes, 1, row}, head.q, a.q_row, dk, g.dk_row, head.m, a.width, head.n);
}

}  // namespace COSMOS_ISA
}  // namespace cosmos
