/* CUDA library: attention of a sample's pooling queries to its LayerNormed tokens, forward, on sm_80 tensor cores.
 *
 *     x^_l = (x_l - mean_l) r_l,  r_l = 1 / std_l        S_ml = r_l (q_m . x_l - mean_l sum_d q_md)
 *     P = softmax_l(S),  lse = log sum_l exp S           Z_m  = sum_l P_ml r_l x_l - sum_l P_ml r_l mean_l
 *
 * LayerNorm is applied to scores and sums, never to the tokens. One block takes up to 64 rows of one sample: all scores
 * first, streaming D in chunks of 64, an exact softmax in fp32, then Z chunk by chunk; the tokens come from the L2 cache
 * the second time. Loads of both passes form one pipeline, which runs on while the softmax is computed.
 *
 * Axes: B batch, L tokens (at most 256), M rows of a sample, D embedding.
 */
#include "pool_call.h"
#include "pool_tile.h"

/* Device pointers. */
struct CosmosPoolForward {
  const void* tokens;  /* [batch, tokens, dim] of the call's 16-bit type */
  const void* queries; /* [batch, rows, dim] */
  void* attended;      /* [batch, rows, dim], written */
  float* lse;          /* [batch, rows], written: natural logarithm */
  CosmosPoolShape shape;
};

namespace cosmos {
namespace {

using namespace pool;

constexpr float kHuge = 3.0e38f;

template <int kTokens>
struct Shared {
  static constexpr int kStages = kTokens > 128 ? 3 : 2; /* two blocks on a multiprocessor up to 128 tokens */
  unsigned char tokens[kStages][kTokens * kChunk * 2];
  unsigned char queries[kStages][kRows * kChunk * 2];
  unsigned char weights[kRows * kTokens * 2];
  float mean[kTokens], rstd[kTokens];
  float query_sum[kRows];
  float part[4][kRows], other_part[4][kRows]; /* reductions over tokens: one part a warp */
};

/* What turns sums over rounded weights into Z: z = (sum - offset) * factor. Two rows a 16-row fragment. */
struct RowFactors {
  float offset[2][2], factor[2][2];
};

/* Softmax of the scores; leaves the weights, times r and scaled so that a row's largest is 1 (r of large tokens would
 * leave the range of fp16), in shared memory, and writes lse. All threads of the block. */
template <Dtype kType, int kTokens, int kTiles>
__device__ __forceinline__ RowFactors softmax(WarpSums<kTiles>& sums, Shared<kTokens>& shared, int length, int rows,
                                              float* lse) {
  const int first = warp_column() * kTiles * 8;
  float peak[2][2], total[2][2], largest[2][2];
  RowFactors result;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const float query_sum = shared.query_sum[WarpSums<kTiles>::row(m, e)];
      float high = -kHuge;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int token = first + n * 8 + WarpSums<kTiles>::column(side);
          float& s = sums.value[m][n][e + side];
          s = token < length ? (s - query_sum * shared.mean[token]) * (kLog2e * shared.rstd[token]) : -INFINITY;
          high = fmaxf(high, s);
        }
      }
      peak[m][e >> 1] = lanes_max<4>(high);
    }
  }
  put_part(shared.part, peak);
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const float high = part_max(shared.part, WarpSums<kTiles>::row(m, e));
      float sum = 0.0f, most = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int token = first + n * 8 + WarpSums<kTiles>::column(side);
          const float weight = exp2_fast(sums.value[m][n][e + side] - high);
          sum += weight;
          const float scaled = token < length ? weight * shared.rstd[token] : 0.0f;
          most = fmaxf(most, scaled);
          sums.value[m][n][e + side] = scaled;
        }
      }
      peak[m][e >> 1] = high;
      total[m][e >> 1] = lanes_sum<4>(sum);
      largest[m][e >> 1] = lanes_max<4>(most);
    }
  }
  __syncthreads(); /* all have read the peaks */
  put_part(shared.part, total);
  put_part(shared.other_part, largest);
  __syncthreads();
  float offset[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int row = WarpSums<kTiles>::row(m, e);
      const float sum = part_sum(shared.part, row), most = part_max(shared.other_part, row);
      const float inverse = 1.0f / most;
      float shift = 0.0f; /* from the rounded weights, so that the mean of the tokens cancels to the last bit */
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int token = first + n * 8 + WarpSums<kTiles>::column(0);
        const uint32_t bits =
            pack<kType>(sums.value[m][n][e] * inverse, sums.value[m][n][e + 1] * inverse);
        const float2 rounded = unpack<kType>(bits);
        shift += rounded.x * shared.mean[token] + rounded.y * shared.mean[token + 1];
        *reinterpret_cast<uint32_t*>(shared.weights + row_offset<kTokens * 2>(row, token >> 3) + (token & 7) * 2) =
            bits;
      }
      offset[m][e >> 1] = lanes_sum<4>(shift);
      result.factor[m][e >> 1] = most / sum;
      if (warp_column() == 0 && (threadIdx.x & 3) == 0 && row < rows)
        lse[row] = kLn2 * peak[m][e >> 1] + logf(sum);
    }
  }
  __syncthreads();
  put_part(shared.part, offset);
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    result.offset[m][0] = part_sum(shared.part, WarpSums<kTiles>::row(m, 0));
    result.offset[m][1] = part_sum(shared.part, WarpSums<kTiles>::row(m, 2));
  }
  return result;
}

template <Dtype kType, int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens > 128 ? 1 : 2) pool_forward_kernel(const CosmosPoolForward call) {
  auto& shared = *reinterpret_cast<Shared<kTokens>*>(shared_memory());
  constexpr int kStages = Shared<kTokens>::kStages;
  constexpr int kTiles = kTokens / 32; /* of eight tokens, a warp */
  const int thread = static_cast<int>(threadIdx.x);
  const CosmosPoolShape& shape = call.shape;
  const int64_t row_blocks = (shape.rows + kRows - 1) / kRows;
  const int64_t sample = blockIdx.x / row_blocks, first_row = blockIdx.x % row_blocks * kRows;
  const int rows = static_cast<int>(shape.rows - first_row < kRows ? shape.rows - first_row : kRows);
  const int length = static_cast<int>(shape.length), dim = static_cast<int>(shape.dim);
  const uint16_t* tokens = static_cast<const uint16_t*>(call.tokens) + sample * shape.batch_stride;
  const uint16_t* queries = static_cast<const uint16_t*>(call.queries) + (sample * shape.rows + first_row) * dim;
  uint16_t* attended = static_cast<uint16_t*>(call.attended) + (sample * shape.rows + first_row) * dim;
  const int chunks = (dim + kChunk - 1) / kChunk;

  const auto load = [&](int step) { /* steps 0 .. chunks - 1: for the scores, chunks .. 2 chunks - 1: for Z */
    if (step < 2 * chunks) {
      const int start = step % chunks * kChunk, stage = step % kStages;
      load_rows<kTokens>(shared.tokens[stage], tokens + start, shape.token_stride, length, dim - start);
      if (step < chunks) load_rows<kRows>(shared.queries[stage], queries + start, dim, rows, dim - start);
    }
    commit_copies();
  };
  const auto await = [&](int step) {
    wait_copies<kStages - 2>();
    __syncthreads(); /* this stage has arrived for all, and none still reads the one to be filled */
    load(step + kStages - 1);
  };

  WarpSums<kTiles> scores;
  Moments moments;
  float query_sum = 0.0f;
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < chunks; ++step) {
    await(step);
    const int start = step * kChunk, count = dim - start < kChunk ? dim - start : kChunk;
    if (thread < kTokens) moments.add<kType>(shared.tokens[step % kStages], thread, start, count);
    if (thread >= kThreads - kRows)
      query_sum += row_sum<kType>(shared.queries[step % kStages], thread - (kThreads - kRows), count / 8);
    add_scores<kType, kTiles>(scores, shared.queries[step % kStages], shared.tokens[step % kStages]);
  }
  if (thread < kTokens) {
    shared.mean[thread] = moments.mean;
    shared.rstd[thread] = 1.0f / sqrtf(moments.squares / static_cast<float>(dim) + shape.eps);
  }
  if (thread >= kThreads - kRows) shared.query_sum[thread - (kThreads - kRows)] = query_sum;
  __syncthreads();
  const RowFactors factors =
      softmax<kType, kTokens, kTiles>(scores, shared, length, rows, call.lse + sample * shape.rows + first_row);
  for (int step = chunks; step < 2 * chunks; ++step) {
    await(step);
    const int start = (step - chunks) * kChunk;
    WarpSums<2> sums;
    add_weighted<kType, kTokens>(sums, shared.weights, shared.tokens[step % kStages]);
    store_rows<kType>(sums, factors.offset, factors.factor, attended + start, dim, rows, dim - start);
  }
}

template <Dtype kType, int kTokens>
struct Forward {
  static int32_t run(const CosmosPoolForward& call, void* stream) {
    const int64_t blocks = call.shape.batch * ((call.shape.rows + kRows - 1) / kRows);
    return launch(pool_forward_kernel<kType, kTokens>, blocks, kThreads, static_cast<int>(sizeof(Shared<kTokens>)),
                  stream, call);
  }
};

}  // namespace
}  // namespace cosmos

/* dtype: 0 for fp16, 1 for bf16. Asynchronous on `stream`, on the current device. Returns COSMOS_OK, COSMOS_BAD_ARGUMENT
 * or a cudaError_t. */
COSMOS_EXPORT int32_t cosmos_pool_forward(const CosmosPoolForward* call, int32_t dtype, void* stream) {
  return cosmos::pool::run<cosmos::Forward>(call, dtype, INT64_MAX, stream);
}
