/* CUDA library: the L2 norm over all elements of many fp32 tensors, in two stages.
 *
 * Stage 1: a block squares and adds one chunk of one tensor, in single precision within a thread (at most 16 elements a
 * sum) and in double from there on, and writes one partial sum. Stage 2: one block adds the partial sums and takes the
 * root. Every order is fixed by the sizes alone: no atomics, the same bits on every run and every device. 4 bytes of
 * traffic per element. Asynchronous on the given stream.
 */
#include <cmath>

#include "launch.h"

namespace cosmos {
namespace {

constexpr int kTensors = 160; /* the parameters stay below the 4 KiB that every architecture takes */
constexpr int kThreads = 256;
constexpr int64_t kChunk = 1 << 14; /* 16 float4 a thread: 16 additions a lane */

struct Table {
  const float* array[kTensors];
  int64_t size[kTensors];
  int64_t first_chunk[kTensors + 1];
  int32_t tensors;
  double* partial; /* of this launch's first chunk */
};
static_assert(sizeof(Table) <= 4096, "kernel parameters");

struct Total {
  const double* partial;
  int64_t partials;
  float* norm;
};

/* Sum over the block, in a fixed order; thread 0 has it. */
__device__ __forceinline__ double block_sum(double value) {
  double* sums = reinterpret_cast<double*>(shared_memory());
  sums[threadIdx.x] = value;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

__global__ void __launch_bounds__(kThreads) sum_of_squares_kernel(const __grid_constant__ Table table) {
  int tensor = 0;
  while (static_cast<int64_t>(blockIdx.x) >= table.first_chunk[tensor + 1]) ++tensor;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - table.first_chunk[tensor]) * kChunk;
  const int64_t rest = table.size[tensor] - begin;
  const int n = static_cast<int>(rest < kChunk ? rest : kChunk);
  const float* x = table.array[tensor] + begin;
  const int vectors = (reinterpret_cast<uintptr_t>(x) & 15u) == 0 ? n / 4 : 0;
  float4 sums = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kThreads) {
    const float4 x4 = reinterpret_cast<const float4*>(x)[i];
    sums.x += x4.x * x4.x;
    sums.y += x4.y * x4.y;
    sums.z += x4.z * x4.z;
    sums.w += x4.w * x4.w;
  }
  double total = (static_cast<double>(sums.x) + sums.y) + (static_cast<double>(sums.z) + sums.w);
  for (int i = 4 * vectors + static_cast<int>(threadIdx.x); i < n; i += kThreads)
    total += static_cast<double>(x[i] * x[i]);
  total = block_sum(total);
  if (threadIdx.x == 0) table.partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) total_kernel(const Total total) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < total.partials; i += kThreads) sum += total.partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *total.norm = static_cast<float>(sqrt(sum));
}

int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

}  // namespace
}  // namespace cosmos

/* Partial sums that cosmos_grad_norm_cuda needs room for. */
COSMOS_EXPORT int64_t cosmos_grad_norm_cuda_partials(const int64_t* sizes, int64_t tensors) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < tensors; ++i) chunks += cosmos::chunks_of(sizes[i]);
  return chunks;
}

/* partial: device memory for the partial sums; norm: one fp32 in device memory, the result.
 * Works on the current device. Returns COSMOS_OK, COSMOS_BAD_ARGUMENT or a cudaError_t. */
COSMOS_EXPORT int32_t cosmos_grad_norm_cuda(const float* const* arrays, const int64_t* sizes, int64_t tensors,
                                            double* partial, float* norm, void* stream) {
  using namespace cosmos;
  if (tensors < 0 || norm == nullptr) return COSMOS_BAD_ARGUMENT;
  constexpr int kShared = kThreads * static_cast<int>(sizeof(double));
  int64_t written = 0;
  for (int64_t next = 0; next < tensors;) {
    Table table = {};
    for (; next < tensors && table.tensors < kTensors; ++next) {
      if (sizes[next] == 0) continue;
      const int slot = table.tensors++;
      table.array[slot] = arrays[next];
      table.size[slot] = sizes[next];
      table.first_chunk[slot + 1] = table.first_chunk[slot] + chunks_of(sizes[next]);
    }
    if (table.tensors == 0) break;
    table.partial = partial + written;
    const int64_t chunks = table.first_chunk[table.tensors];
    const int32_t status = launch(sum_of_squares_kernel, chunks, kThreads, kShared, stream, table);
    if (status != COSMOS_OK) return status;
    written += chunks;
  }
  return launch(total_kernel, 1, kThreads, kShared, stream, Total{partial, written, norm});
}
