/* CUDA library: fused AdamW + EMA over many tensors.
 *
 * A launch carries the pointers of up to kTensors tensors as a kernel parameter (no copy to the device, no allocation).
 * Blocks stride over chunks of kChunk elements; a chunk belongs to one tensor. Where all arrays of a tensor are aligned
 * to 16 bytes, elements move as float4 and the ragged end one by one. The gradient scale may come from device memory,
 * so that clipping needs no synchronisation. Asynchronous on the given stream.
 */
#include <cuda_runtime.h>

#include "adamw_ema.h"

namespace {

constexpr int kTensors = 48; /* 48 * 56 + 8 bytes of parameters: below the 4 KiB that every architecture takes */
constexpr int kThreads = 256;
constexpr int64_t kChunk = 1 << 14;

struct Table {
  float* param[kTensors];
  const float* grad[kTensors];
  float* exp_avg[kTensors];
  float* exp_avg_sq[kTensors];
  float* ema[kTensors];
  int64_t size[kTensors];
  int64_t first_chunk[kTensors + 1];
  int32_t tensors;
};
static_assert(sizeof(Table) + sizeof(cosmos::AdamwEmaConstants) + sizeof(void*) <= 4096, "kernel parameters");

__device__ __forceinline__ bool aligned16(const void* a, const void* b, const void* c, const void* d, const void* e) {
  return ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c) |
           reinterpret_cast<uintptr_t>(d) | reinterpret_cast<uintptr_t>(e)) & 15u) == 0;
}

template <bool kEma>
__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const Table table, cosmos::AdamwEmaConstants c, const float* __restrict__ grad_scale) {
  if (grad_scale != nullptr) c.grad_scale *= *grad_scale;
  const int64_t chunks = table.first_chunk[table.tensors];
  int tensor = 0; /* chunks of a block only grow: the search goes on where it stopped */
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    while (chunk >= table.first_chunk[tensor + 1]) ++tensor;
    const int64_t begin = (chunk - table.first_chunk[tensor]) * kChunk;
    const int64_t rest = table.size[tensor] - begin;
    const int n = static_cast<int>(rest < kChunk ? rest : kChunk);
    float* p = table.param[tensor] + begin;
    const float* g = table.grad[tensor] + begin;
    float* m = table.exp_avg[tensor] + begin;
    float* v = table.exp_avg_sq[tensor] + begin;
    float* ema = kEma ? table.ema[tensor] + begin : p;
    const int vectors = aligned16(p, g, m, v, ema) ? n / 4 : 0;
    for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kThreads) {
      float4 p4 = reinterpret_cast<const float4*>(p)[i];
      const float4 g4 = reinterpret_cast<const float4*>(g)[i];
      float4 m4 = reinterpret_cast<const float4*>(m)[i];
      float4 v4 = reinterpret_cast<const float4*>(v)[i];
      float4 e4 = kEma ? reinterpret_cast<const float4*>(ema)[i] : p4;
      cosmos::update_element<kEma>(c, p4.x, g4.x, m4.x, v4.x, e4.x);
      cosmos::update_element<kEma>(c, p4.y, g4.y, m4.y, v4.y, e4.y);
      cosmos::update_element<kEma>(c, p4.z, g4.z, m4.z, v4.z, e4.z);
      cosmos::update_element<kEma>(c, p4.w, g4.w, m4.w, v4.w, e4.w);
      reinterpret_cast<float4*>(p)[i] = p4;
      reinterpret_cast<float4*>(m)[i] = m4;
      reinterpret_cast<float4*>(v)[i] = v4;
      if (kEma) reinterpret_cast<float4*>(ema)[i] = e4;
    }
    for (int i = 4 * vectors + static_cast<int>(threadIdx.x); i < n; i += kThreads) {
      float p1 = p[i], m1 = m[i], v1 = v[i], e1 = kEma ? ema[i] : 0.0f;
      cosmos::update_element<kEma>(c, p1, g[i], m1, v1, e1);
      p[i] = p1;
      m[i] = m1;
      v[i] = v1;
      if (kEma) ema[i] = e1;
    }
  }
}

/* Fills the table with tensors from `next` on, skipping empty ones; returns the first tensor left over. */
int64_t fill(Table* table, const CosmosAdamwEmaTensors& t, int64_t next) {
  table->tensors = 0;
  table->first_chunk[0] = 0;
  for (; next < t.tensors && table->tensors < kTensors; ++next) {
    if (t.sizes[next] == 0) continue;
    const int slot = table->tensors++;
    table->param[slot] = t.param[next];
    table->grad[slot] = t.grad[next];
    table->exp_avg[slot] = t.exp_avg[next];
    table->exp_avg_sq[slot] = t.exp_avg_sq[next];
    table->ema[slot] = t.ema != nullptr ? t.ema[next] : nullptr;
    table->size[slot] = t.sizes[next];
    table->first_chunk[slot + 1] = table->first_chunk[slot] + (t.sizes[next] + kChunk - 1) / kChunk;
  }
  return next;
}

}  // namespace

/* grad_scale_device: null, or one fp32 in device memory that multiplies options->grad_scale.
 * Works on the current device. Returns COSMOS_OK, COSMOS_BAD_ARGUMENT or a cudaError_t. */
COSMOS_EXPORT int32_t cosmos_adamw_ema_cuda(const CosmosAdamwEmaTensors* tensors, const CosmosAdamwEmaOptions* options,
                                            const float* grad_scale_device, void* stream) {
  if (!cosmos::valid(tensors, options)) return COSMOS_BAD_ARGUMENT;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const cosmos::AdamwEmaConstants c = cosmos::constants(*options);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  Table table;
  for (int64_t next = 0; next < tensors->tensors;) {
    next = fill(&table, *tensors, next);
    if (table.tensors == 0) break;
    const int64_t chunks = table.first_chunk[table.tensors];
    const int64_t most = static_cast<int64_t>(processors) * 8; /* 8 * 256 threads fill an SM */
    const unsigned blocks = static_cast<unsigned>(chunks < most ? chunks : most);
    if (tensors->ema != nullptr) {
      adamw_ema_kernel<true><<<blocks, kThreads, 0, queue>>>(table, c, grad_scale_device);
    } else {
      adamw_ema_kernel<false><<<blocks, kThreads, 0, queue>>>(table, c, grad_scale_device);
    }
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return COSMOS_OK;
}
