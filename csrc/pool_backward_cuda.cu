/* CUDA library: backward of the attention of a sample's pooling queries to its LayerNormed tokens, on sm_80 tensor cores.
 *
 * With x^_l = (x_l - mean_l) r_l, S = q x^T, P = exp(S - lse), Z = P x^, and dP = dZ x^T:
 *
 *     dS  = P (dP - rowsum(P dP))        dq = dS x^         dx^ = P^T dZ + dS^T q
 *     dx_l = r_l (dx^_l - c1_l - x^_l c2_l)
 *     c1_l = sum_m (P_ml sum_d dZ_md + dS_ml sum_d q_md) / D        c2_l = sum_m (P_ml dP_ml + dS_ml S_ml) / D
 *
 * c1 and c2 are the means of dx^ and of dx^ x^ that the LayerNorm's backward subtracts; they need no dx^. One block a
 * sample: S and dP first, streaming D in chunks of 64, then Z, dq and dx chunk by chunk. r P and r dS are kept as 16-bit
 * numbers of size one or less, each with one factor for the sample. Nothing but the results leaves the chip.
 *
 * Axes: B batch, L tokens (at most 256), M rows of a sample (at most 64), D embedding.
 */
#include "pool_call.h"
#include "pool_tile.h"

/* Device pointers. */
struct CosmosPoolBackward {
  const void* tokens;        /* [batch, tokens, dim] of the call's 16-bit type */
  const void* queries;       /* [batch, rows, dim] */
  const void* grad_attended; /* [batch, rows, dim] */
  const float* lse;          /* [batch, rows]: of the forward pass */
  void* attended;            /* [batch, rows, dim], written: Z once more */
  void* grad_queries;        /* [batch, rows, dim], written */
  void* grad_tokens;         /* [batch, tokens, dim], written, contiguous */
  CosmosPoolShape shape;
};

namespace cosmos {
namespace {

using namespace pool;

template <int kTokens>
struct Shared {
  static constexpr int kStages = kTokens > 128 ? 1 : 2; /* 256 tokens: what fits an A100 */
  unsigned char tokens[kStages][kTokens * kChunk * 2];
  unsigned char queries[kStages][kRows * kChunk * 2];
  unsigned char grads[kStages][kRows * kChunk * 2];
  unsigned char weights[kRows * kTokens * 2];     /* r P / largest r */
  unsigned char grad_scores[kRows * kTokens * 2]; /* r dS / grad_scale */
  float mean[kTokens], rstd[kTokens];
  float c1[2][kTokens], c2[2][kTokens]; /* times r: one part each half of the rows */
  float query_sum[kRows], grad_sum[kRows];
  float part[4][kRows], other_part[4][kRows];
  float warp_largest[2][8];
};

struct Factors {
  float weight, grad_score;                        /* of the sample */
  float weight_offset[2][2], grad_score_offset[2][2]; /* of the rows: what the mean of the tokens takes */
};

/* Sum over the eight lanes that hold one column. */
__device__ __forceinline__ float column_sum(float value) {
  value += shuffle_xor(value, 4);
  value += shuffle_xor(value, 8);
  return value + shuffle_xor(value, 16);
}

__device__ __forceinline__ float block_max(float (&largest)[8], float value) {
  value = lanes_max<32>(value);
  if ((threadIdx.x & 31) == 0) largest[threadIdx.x >> 5] = value;
  __syncthreads();
  float most = largest[0];
#pragma unroll
  for (int warp = 1; warp < 8; ++warp) most = fmaxf(most, largest[warp]);
  return most;
}

/* From the raw products q x and dZ x to r P and r dS in shared memory, and all that the gradients need beside them.
 * All threads of the block. */
template <Dtype kType, int kTokens, int kTiles>
__device__ __forceinline__ Factors softmax_backward(WarpSums<kTiles>& scores, WarpSums<kTiles>& grads,
                                                    Shared<kTokens>& shared, int length, int rows, int dim,
                                                    const float* lse) {
  const int first = warp_column() * kTiles * 8;
  float inner[2][2]; /* rowsum(P dP) */
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int row = WarpSums<kTiles>::row(m, e);
      const float row_lse = row < rows ? lse[row] : 0.0f;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int token = first + n * 8 + WarpSums<kTiles>::column(side);
          float &s = scores.value[m][n][e + side], &g = grads.value[m][n][e + side];
          s = (s - shared.query_sum[row] * shared.mean[token]) * shared.rstd[token];
          g = (g - shared.grad_sum[row] * shared.mean[token]) * shared.rstd[token];
          if (token < length && row < rows) sum += exp2_fast(kLog2e * (s - row_lse)) * g;
        }
      }
      inner[m][e >> 1] = lanes_sum<4>(sum);
    }
  }
  put_part(shared.part, inner);
  float r = 0.0f; /* no token's 1 / std is larger than that of the block's largest */
  for (int token = static_cast<int>(threadIdx.x); token < length; token += kThreads) r = fmaxf(r, shared.rstd[token]);
  Factors result;
  result.weight = block_max(shared.warp_largest[0], r); /* its barrier serves the parts as well */

  float most = 0.0f;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int token = first + n * 8 + WarpSums<kTiles>::column(side);
      float c2 = 0.0f;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int row = WarpSums<kTiles>::row(m, e);
          float &s = scores.value[m][n][e + side], &g = grads.value[m][n][e + side];
          const float row_lse = row < rows ? lse[row] : 0.0f;
          const float weight = token < length && row < rows ? exp2_fast(kLog2e * (s - row_lse)) : 0.0f;
          const float grad_score = weight != 0.0f ? weight * (g - part_sum(shared.part, row)) : 0.0f;
          c2 += weight != 0.0f ? weight * g + grad_score * s : 0.0f;
          s = weight * (shared.rstd[token] / result.weight);
          g = grad_score * shared.rstd[token];
          most = fmaxf(most, fabsf(g));
        }
      }
      c2 = column_sum(c2) * shared.rstd[token] / static_cast<float>(dim);
      if ((threadIdx.x & 31) < 4) shared.c2[threadIdx.x >> 7][token] = c2;
    }
  }
  most = block_max(shared.warp_largest[1], most);
  result.grad_score = exp2f(ceilf(log2f(fmaxf(most, 1e-30f)))); /* a power of two: dividing by it is exact */
  const float inverse = 1.0f / result.grad_score;

  float weight_offset[2][2] = {}, grad_score_offset[2][2] = {};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int token = first + n * 8 + WarpSums<kTiles>::column(0);
    float c1[2] = {};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int row = WarpSums<kTiles>::row(m, e);
        const uint32_t weights = pack<kType>(scores.value[m][n][e], scores.value[m][n][e + 1]);
        const uint32_t grad_scores = pack<kType>(grads.value[m][n][e] * inverse, grads.value[m][n][e + 1] * inverse);
        const int offset = row_offset<kTokens * 2>(row, token >> 3) + (token & 7) * 2;
        *reinterpret_cast<uint32_t*>(shared.weights + offset) = weights;
        *reinterpret_cast<uint32_t*>(shared.grad_scores + offset) = grad_scores;
        /* From the rounded numbers, so that the means of the tokens cancel to the last bit. */
        const float2 w = unpack<kType>(weights), g = unpack<kType>(grad_scores);
        weight_offset[m][e >> 1] += w.x * shared.mean[token] + w.y * shared.mean[token + 1];
        grad_score_offset[m][e >> 1] += g.x * shared.mean[token] + g.y * shared.mean[token + 1];
        c1[0] += w.x * result.weight * shared.grad_sum[row] + g.x * result.grad_score * shared.query_sum[row];
        c1[1] += w.y * result.weight * shared.grad_sum[row] + g.y * result.grad_score * shared.query_sum[row];
      }
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      c1[side] = column_sum(c1[side]) / static_cast<float>(dim);
      if ((threadIdx.x & 31) < 4) shared.c1[threadIdx.x >> 7][token + side] = c1[side];
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      weight_offset[m][half] = lanes_sum<4>(weight_offset[m][half]);
      grad_score_offset[m][half] = lanes_sum<4>(grad_score_offset[m][half]);
    }
  }
  put_part(shared.part, weight_offset); /* all have read the former part: block_max has a barrier */
  put_part(shared.other_part, grad_score_offset);
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = WarpSums<kTiles>::row(m, half * 2);
      result.weight_offset[m][half] = part_sum(shared.part, row);
      result.grad_score_offset[m][half] = part_sum(shared.other_part, row);
    }
  }
  return result;
}

/* Tokens x channels over the eight warps: kTokens / 16 fragments of 16 tokens, at most 64 channels a warp. */
template <int kTokens>
struct TokenSums {
  static constexpr int kTokenWarps = kTokens > 64 ? 8 : 4, kChannelWarps = 8 / kTokenWarps;
  static constexpr int kFragments = kTokens / 16 / kTokenWarps, kTiles = 8 / kChannelWarps;
  float value[kFragments][kTiles][4] = {};
  __device__ __forceinline__ static int first_token() {
    return (static_cast<int>(threadIdx.x) >> 5) % kTokenWarps * kFragments * 16;
  }
  __device__ __forceinline__ static int first_channel() {
    return (static_cast<int>(threadIdx.x) >> 5) / kTokenWarps * kTiles * 8;
  }
};

/* sums += weights^T rows: over the 64 rows, of weights [64, kTokens] and a chunk of queries or gradients. */
template <Dtype kType, int kTokens>
__device__ __forceinline__ void add_to_tokens(TokenSums<kTokens>& sums, const unsigned char* weights,
                                              const unsigned char* rows) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
#pragma unroll
  for (int k = 0; k < kRows; k += 16) {
    uint32_t b[TokenSums<kTokens>::kTiles / 2][4];
#pragma unroll
    for (int n = 0; n < TokenSums<kTokens>::kTiles / 2; ++n)
      load_matrices_transposed(b[n], rows + row_offset<128>(k + (((lane >> 3) & 1) << 3) + (lane & 7),
                                                            (sums.first_channel() >> 3) + n * 2 + (lane >> 4)));
#pragma unroll
    for (int m = 0; m < TokenSums<kTokens>::kFragments; ++m) {
      uint32_t a[4];
      load_matrices_transposed(a, weights + row_offset<kTokens * 2>(k + ((lane >> 4) << 3) + (lane & 7),
                                                                    (sums.first_token() >> 3) + m * 2 +
                                                                        ((lane >> 3) & 1)));
#pragma unroll
      for (int n = 0; n < TokenSums<kTokens>::kTiles; ++n)
        multiply_add<kType>(sums.value[m][n], a, b[n >> 1][(n & 1) * 2], b[n >> 1][(n & 1) * 2 + 1]);
    }
  }
}

/* A chunk of dx. */
template <Dtype kType, int kTokens>
__device__ __forceinline__ void token_gradients(const Shared<kTokens>& shared, int stage, const Factors& factors,
                                                uint16_t* out, int64_t dim, int length, int width) {
  using Sums = TokenSums<kTokens>;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  Sums sums;
  add_to_tokens<kType, kTokens>(sums, shared.grad_scores, shared.queries[stage]);
  const float ratio = factors.grad_score / factors.weight;
#pragma unroll
  for (int m = 0; m < Sums::kFragments; ++m) {
#pragma unroll
    for (int n = 0; n < Sums::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.value[m][n][e] *= ratio;
    }
  }
  add_to_tokens<kType, kTokens>(sums, shared.weights, shared.grads[stage]);
#pragma unroll
  for (int m = 0; m < Sums::kFragments; ++m) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int token = Sums::first_token() + m * 16 + (lane >> 2) + (e >> 1) * 8;
      const float mean = shared.mean[token], rstd = shared.rstd[token];
      const float c1 = shared.c1[0][token] + shared.c1[1][token], c2 = shared.c2[0][token] + shared.c2[1][token];
#pragma unroll
      for (int n = 0; n < Sums::kTiles; ++n) {
        const int channel = Sums::first_channel() + n * 8 + (lane & 3) * 2;
        if (token >= length || channel >= width) continue;
        const float2 x = unpack<kType>(*reinterpret_cast<const uint32_t*>(
            shared.tokens[stage] + row_offset<128>(token, channel >> 3) + (channel & 7) * 2));
        *reinterpret_cast<uint32_t*>(out + token * dim + channel) =
            pack<kType>(sums.value[m][n][e] * factors.weight - c1 - (x.x - mean) * rstd * c2,
                        sums.value[m][n][e + 1] * factors.weight - c1 - (x.y - mean) * rstd * c2);
      }
    }
  }
}

template <Dtype kType, int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens > 64 ? 1 : 2)
    pool_backward_kernel(const CosmosPoolBackward call) {
  auto& shared = *reinterpret_cast<Shared<kTokens>*>(shared_memory());
  constexpr int kStages = Shared<kTokens>::kStages;
  constexpr int kTiles = kTokens / 32; /* of eight tokens, a warp */
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t sample = blockIdx.x;
  const CosmosPoolShape& shape = call.shape;
  const int length = static_cast<int>(shape.length), rows = static_cast<int>(shape.rows);
  const int dim = static_cast<int>(shape.dim), chunks = (dim + kChunk - 1) / kChunk;
  const uint16_t* tokens = static_cast<const uint16_t*>(call.tokens) + sample * shape.batch_stride;
  const uint16_t* queries = static_cast<const uint16_t*>(call.queries) + sample * rows * dim;
  const uint16_t* grads = static_cast<const uint16_t*>(call.grad_attended) + sample * rows * dim;
  const int64_t out = sample * rows * dim;

  const auto load = [&](int step) { /* chunks of both passes, one after the other */
    if (step < 2 * chunks) {
      const int start = step % chunks * kChunk, stage = step % kStages;
      load_rows<kTokens>(shared.tokens[stage], tokens + start, shape.token_stride, length, dim - start);
      load_rows<kRows>(shared.queries[stage], queries + start, dim, rows, dim - start);
      load_rows<kRows>(shared.grads[stage], grads + start, dim, rows, dim - start);
    }
    commit_copies();
  };
  const auto await = [&](int step) { /* returns once the step's chunk has arrived for all threads */
    if constexpr (kStages == 1) {
      __syncthreads(); /* all have read the former chunk */
      load(step);
    }
    wait_copies<0>();
    __syncthreads();
    if constexpr (kStages > 1) load(step + 1);
  };

  WarpSums<kTiles> scores, grad_weights;
  Moments moments;
  float row_total = 0.0f; /* threads of the last two warps: of a query; of the two before: of a gradient */
  if constexpr (kStages > 1) load(0);
  for (int step = 0; step < chunks; ++step) {
    await(step);
    const int stage = step % kStages, start = step * kChunk, count = dim - start < kChunk ? dim - start : kChunk;
    if (thread < kTokens) moments.add<kType>(shared.tokens[stage], thread, start, count);
    if (thread >= kThreads - 2 * kRows)
      row_total += row_sum<kType>(thread >= kThreads - kRows ? shared.queries[stage] : shared.grads[stage],
                                  thread % kRows, count / 8);
    add_scores<kType, kTiles>(scores, shared.queries[stage], shared.tokens[stage]);
    add_scores<kType, kTiles>(grad_weights, shared.grads[stage], shared.tokens[stage]);
  }
  if (thread < kTokens) {
    shared.mean[thread] = moments.mean;
    shared.rstd[thread] = 1.0f / sqrtf(moments.squares / static_cast<float>(dim) + shape.eps);
  }
  if (thread >= kThreads - kRows) {
    shared.query_sum[thread % kRows] = row_total;
  } else if (thread >= kThreads - 2 * kRows) {
    shared.grad_sum[thread % kRows] = row_total;
  }
  __syncthreads();
  const Factors factors = softmax_backward<kType, kTokens, kTiles>(scores, grad_weights, shared, length, rows, dim,
                                                                   call.lse + sample * rows);
  const float weight[2][2] = {{factors.weight, factors.weight}, {factors.weight, factors.weight}};
  const float grad_score[2][2] = {{factors.grad_score, factors.grad_score}, {factors.grad_score, factors.grad_score}};
  for (int step = chunks; step < 2 * chunks; ++step) {
    await(step);
    const int stage = step % kStages, start = (step - chunks) * kChunk;
    WarpSums<2> attended, grad_queries;
    add_weighted<kType, kTokens>(attended, shared.weights, shared.tokens[stage]);
    store_rows<kType>(attended, factors.weight_offset, weight, static_cast<uint16_t*>(call.attended) + out + start, dim,
                      rows, dim - start);
    add_weighted<kType, kTokens>(grad_queries, shared.grad_scores, shared.tokens[stage]);
    store_rows<kType>(grad_queries, factors.grad_score_offset, grad_score,
                      static_cast<uint16_t*>(call.grad_queries) + out + start, dim, rows, dim - start);
    token_gradients<kType, kTokens>(shared, stage, factors,
                                    static_cast<uint16_t*>(call.grad_tokens) + sample * length * dim + start, dim,
                                    length, dim - start);
  }
}

template <Dtype kType, int kTokens>
struct Backward {
  static int32_t run(const CosmosPoolBackward& call, void* stream) {
    return launch(pool_backward_kernel<kType, kTokens>, call.shape.batch, kThreads,
                  static_cast<int>(sizeof(Shared<kTokens>)), stream, call);
  }
};

}  // namespace
}  // namespace cosmos

/* At most 64 rows a sample. dtype: 0 for fp16, 1 for bf16. Asynchronous on `stream`, on the current device. Returns
 * COSMOS_OK, COSMOS_BAD_ARGUMENT or a cudaError_t. */
COSMOS_EXPORT int32_t cosmos_pool_backward(const CosmosPoolBackward* call, int32_t dtype, void* stream) {
  return cosmos::pool::run<cosmos::Backward>(call, dtype, cosmos::pool::kRows, stream);
}
