/* CUDA library: fused AdamW + EMA over many tensors.
 *
 * A launch carries the pointers of up to kTensors tensors as a kernel parameter (no copy to the device, no allocation).
 * A block updates one chunk of one tensor: many small blocks, so that the last wave is a small part of the whole. Where
 * all arrays of a tensor are aligned, elements move as float4 and the ragged end one by one. Gradient scale and norm
 * may lie in device memory, so that neither clipping nor leaving out a step that is not finite needs the host.
 * Asynchronous on the given stream.
 */
#include "adamw_ema.h"
#include "launch.h"

namespace cosmos {
namespace {

constexpr int kTensors = 42; /* the parameters stay below the 4 KiB that every architecture takes */
constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;

struct Table {
  float* param[kTensors];
  const float* grad[kTensors];
  float* exp_avg[kTensors];
  float* exp_avg_sq[kTensors];
  float* ema[kTensors];
  uint16_t* param_copy[kTensors];
  uint16_t* ema_copy[kTensors];
  int64_t size[kTensors];
  int64_t first_chunk[kTensors + 1];
  AdamwEmaTensorConstants constants[kTensors];
  uint8_t clamped[kTensors];
  int32_t tensors;
  AdamwEmaConstants common;
  const float* grad_scale; /* null, or a factor in device memory */
  const float* norm;       /* null, or the norm of the gradients in device memory, before the factors */
  float clip_norm;         /* negative: no clipping */
  bool skip_nonfinite;
};
static_assert(sizeof(Table) <= 4096, "kernel parameters");

/* The factor of the gradients; torch.nn.utils.clip_grad_norm_'s 1e-6 in it. A norm that is NaN makes it NaN. */
__device__ __forceinline__ float scale_of(const Table& table, float norm) {
  float scale = table.common.grad_scale;
  if (table.grad_scale != nullptr) scale *= *table.grad_scale;
  if (table.clip_norm < 0.0f) return scale;
  const float factor = table.clip_norm / (fabsf(scale) * norm + 1e-6f);
  return factor >= 1.0f ? scale : scale * factor;
}

__device__ __forceinline__ bool aligned(const void* pointer, uintptr_t bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}

struct alignas(8) FourBfloat16 {
  uint32_t low, high;
};

template <bool kEma>
struct Chunk {
  AdamwEmaConstants c;
  AdamwEmaTensorConstants t;
  bool clamped;
  float* p;
  const float* g;
  float* m;
  float* v;
  float* ema;
  uint16_t* p_copy;
  uint16_t* ema_copy;

  __device__ __forceinline__ void element(float& p1, float g1, float& m1, float& v1, float& e1) const {
    update_element<kEma>(c, t, p1, g1, m1, v1, e1);
    if (clamped) {
      p1 = clamp(p1, c.low, c.high);
      e1 = clamp(e1, c.low, c.high);
    }
  }

  __device__ __forceinline__ static void store_copy(uint16_t* copy, int i, const float4& x) {
    reinterpret_cast<FourBfloat16*>(copy)[i] = {pack<Dtype::kBfloat16>(x.x, x.y), pack<Dtype::kBfloat16>(x.z, x.w)};
  }

  __device__ __forceinline__ void four(int i) const {
    float4 p4 = reinterpret_cast<const float4*>(p)[i];
    const float4 g4 = reinterpret_cast<const float4*>(g)[i];
    float4 m4 = reinterpret_cast<const float4*>(m)[i];
    float4 v4 = reinterpret_cast<const float4*>(v)[i];
    float4 e4 = kEma ? reinterpret_cast<const float4*>(ema)[i] : p4;
    element(p4.x, g4.x, m4.x, v4.x, e4.x);
    element(p4.y, g4.y, m4.y, v4.y, e4.y);
    element(p4.z, g4.z, m4.z, v4.z, e4.z);
    element(p4.w, g4.w, m4.w, v4.w, e4.w);
    reinterpret_cast<float4*>(p)[i] = p4;
    reinterpret_cast<float4*>(m)[i] = m4;
    reinterpret_cast<float4*>(v)[i] = v4;
    if (kEma) reinterpret_cast<float4*>(ema)[i] = e4;
    if (p_copy != nullptr) store_copy(p_copy, i, p4);
    if (kEma && ema_copy != nullptr) store_copy(ema_copy, i, e4);
  }

  __device__ __forceinline__ void one(int i) const {
    float p1 = p[i], m1 = m[i], v1 = v[i], e1 = kEma ? ema[i] : p1;
    element(p1, g[i], m1, v1, e1);
    p[i] = p1;
    m[i] = m1;
    v[i] = v1;
    if (kEma) ema[i] = e1;
    if (p_copy != nullptr)
      p_copy[i] = static_cast<uint16_t>(pack<Dtype::kBfloat16>(p1, 0.0f));
    if (kEma && ema_copy != nullptr)
      ema_copy[i] = static_cast<uint16_t>(pack<Dtype::kBfloat16>(e1, 0.0f));
  }
};

template <typename T>
__device__ __forceinline__ T* offset(T* pointer, int64_t elements) {
  return pointer != nullptr ? pointer + elements : nullptr;
}

template <bool kEma>
__global__ void __launch_bounds__(kThreads) adamw_ema_kernel(const __grid_constant__ Table table) {
  float norm = 0.0f;
  if (table.norm != nullptr) norm = *table.norm;
  if (table.skip_nonfinite && !(norm - norm == 0.0f)) return;
  int tensor = 0;
  while (static_cast<int64_t>(blockIdx.x) >= table.first_chunk[tensor + 1]) ++tensor;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - table.first_chunk[tensor]) * kChunk;
  const int64_t rest = table.size[tensor] - begin;
  const int n = static_cast<int>(rest < kChunk ? rest : kChunk);
  Chunk<kEma> chunk{table.common, table.constants[tensor], table.clamped[tensor] != 0, table.param[tensor] + begin,
                    table.grad[tensor] + begin, table.exp_avg[tensor] + begin, table.exp_avg_sq[tensor] + begin,
                    offset(table.ema[tensor], begin), offset(table.param_copy[tensor], begin),
                    offset(table.ema_copy[tensor], begin)};
  chunk.c.grad_scale = scale_of(table, norm);
  const bool whole = aligned(chunk.p, 16) && aligned(chunk.g, 16) && aligned(chunk.m, 16) && aligned(chunk.v, 16) &&
                     aligned(chunk.ema, 16) && aligned(chunk.p_copy, 8) && aligned(chunk.ema_copy, 8);
  const int vectors = whole ? n / 4 : 0;
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kThreads) chunk.four(i);
  for (int i = 4 * vectors + static_cast<int>(threadIdx.x); i < n; i += kThreads) chunk.one(i);
}

/* Fills the table with tensors from `next` on, skipping empty ones; returns the first tensor left over. */
int64_t fill(Table* table, const CosmosAdamwEmaTensors& t, const CosmosAdamwEmaOptions& o, int64_t next) {
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
    table->param_copy[slot] = t.param_copy != nullptr ? t.param_copy[next] : nullptr;
    table->ema_copy[slot] = t.ema_copy != nullptr ? t.ema_copy[next] : nullptr;
    table->size[slot] = t.sizes[next];
    table->constants[slot] = tensor_constants(o, t, next);
    table->clamped[slot] = t.clamped != nullptr ? t.clamped[next] : uint8_t{0};
    table->first_chunk[slot + 1] = table->first_chunk[slot] + (t.sizes[next] + kChunk - 1) / kChunk;
  }
  return next;
}

}  // namespace
}  // namespace cosmos

/* grad_scale: null, or one fp32 in device memory that multiplies options->grad_scale. norm: null, or the norm of the
 * gradients in device memory, before either factor; clipping and skipping need it.
 * Works on the current device. Returns COSMOS_OK, COSMOS_BAD_ARGUMENT or a cudaError_t. */
COSMOS_EXPORT int32_t cosmos_adamw_ema_cuda(const CosmosAdamwEmaTensors* tensors, const CosmosAdamwEmaOptions* options,
                                            const float* grad_scale, const float* norm, void* stream) {
  if (!cosmos::valid(tensors, options)) return COSMOS_BAD_ARGUMENT;
  if (norm == nullptr && (options->clip_norm >= 0.0 || options->skip_nonfinite != 0)) return COSMOS_BAD_ARGUMENT;
  cosmos::Table table = {};
  table.common = cosmos::constants(*options);
  table.grad_scale = grad_scale;
  table.norm = norm;
  table.clip_norm = static_cast<float>(options->clip_norm);
  table.skip_nonfinite = options->skip_nonfinite != 0;
  for (int64_t next = 0; next < tensors->tensors;) {
    next = cosmos::fill(&table, *tensors, *options, next);
    if (table.tensors == 0) break;
    const auto kernel = tensors->ema != nullptr ? cosmos::adamw_ema_kernel<true> : cosmos::adamw_ema_kernel<false>;
    const int32_t status = cosmos::launch(kernel, table.first_chunk[table.tensors], cosmos::kThreads, 0, stream, table);
    if (status != COSMOS_OK) return status;
  }
  return COSMOS_OK;
}
