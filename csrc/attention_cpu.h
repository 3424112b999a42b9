/* Self-attention of packed sequences in fp32 on the CPU: what a call is given, and the work on one head.
 *
 *     out_i = sum_j P_ij v_j,   P = softmax_j(scale q_i . k_j)   over the keys j of its sequence that query i sees
 *
 * attention_heads_cpu.cpp is compiled once for every instruction set, each time in a namespace of that name;
 * attention_cpu.cpp picks one and shares the heads out among threads.
 */
#ifndef COSMOS_ATTENTION_CPU_H
#define COSMOS_ATTENTION_CPU_H

#include <cstdint>

#include "cosmos.h"

/* Queries and keys in packed rows of heads * width channels, heads side by side; rows `..._row` elements apart. */
struct CosmosAttention {
  const float *q, *k, *v;
  int64_t q_row, k_row, v_row;
  const int32_t *cu_queries, *cu_keys; /* [sequences + 1]: rows where sequences begin */
  int64_t sequences, heads, width;     /* width: a multiple of 8 */
  float scale;
  int32_t causal; /* query i of n sees the first m - n + i + 1 of m keys; m >= n */
};

struct CosmosAttentionGrads {
  const float *grad_out, *lse;
  float *dq, *dk, *dv;
  int64_t grad_row, dq_row, dk_row, dv_row;
};

namespace cosmos {

/* Room of one thread, in floats: keys or values by columns [width, keys], two matrices of scores [queries, keys]. */
struct AttentionRoom {
  float *columns, *weights, *slopes;
};

/* Task t is head t % heads of sequence t / heads. `keys` of the room are rounded up to whole vectors of 8. */
namespace baseline {
void forward_head(const CosmosAttention& a, int64_t task, const AttentionRoom& room, float* out, float* lse);
void backward_head(const CosmosAttention& a, const CosmosAttentionGrads& g, int64_t task, const AttentionRoom& room);
}  // namespace baseline

namespace avx2 {
void forward_head(const CosmosAttention& a, int64_t task, const AttentionRoom& room, float* out, float* lse);
void backward_head(const CosmosAttention& a, const CosmosAttentionGrads& g, int64_t task, const AttentionRoom& room);
}  // namespace avx2

}  // namespace cosmos

#endif /* COSMOS_ATTENTION_CPU_H */
