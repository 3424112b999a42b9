/* CPU library: fused AdamW + EMA, and the sum of squares for the global gradient norm.
 *
 * Work is cut into chunks that depend on the sizes alone, so results do not depend on the number of threads. The inner
 * loops are compiled once per instruction set and picked at load time: the library runs on any x86-64 (and elsewhere,
 * where the compiler offers no such choice, in its baseline form).
 */
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "adamw_ema.h"

#ifdef COSMOS_TARGET_CLONES
#define COSMOS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define COSMOS_CLONES
#endif

namespace {

constexpr int64_t kChunk = 1 << 15; /* elements a thread takes at a time: 640 KiB over the five arrays */
constexpr int64_t kBlock = 1 << 12; /* elements between two looks at the copies: they are read back from the cache */

/* Flat list of chunks over all tensors: chunk c belongs to the tensor i with first[i] <= c < first[i + 1]. */
class Chunks {
 public:
  Chunks(const int64_t* sizes, int64_t tensors) : first_(static_cast<size_t>(tensors) + 1, 0), sizes_(sizes) {
    for (size_t i = 0; i + 1 < first_.size(); ++i) first_[i + 1] = first_[i] + (sizes[i] + kChunk - 1) / kChunk;
  }
  int64_t count() const { return first_.back(); }
  struct Range {
    size_t tensor;
    int64_t begin, length;
  };
  Range operator[](int64_t chunk) const {
    const auto next = std::upper_bound(first_.begin(), first_.end(), chunk);
    const size_t tensor = static_cast<size_t>(next - first_.begin()) - 1;
    const int64_t begin = (chunk - first_[tensor]) * kChunk;
    return {tensor, begin, std::min(kChunk, sizes_[tensor] - begin)};
  }

 private:
  std::vector<int64_t> first_;
  const int64_t* sizes_;
};

COSMOS_CLONES void update_with_ema(const cosmos::AdamwEmaConstants& constants,
                                   const cosmos::AdamwEmaTensorConstants& of_tensor, float* __restrict p,
                                   const float* __restrict g, float* __restrict m, float* __restrict v,
                                   float* __restrict ema, int64_t n) {
  const cosmos::AdamwEmaConstants c = constants; /* local copies: the compiler may keep them in registers */
  const cosmos::AdamwEmaTensorConstants t = of_tensor;
  for (int64_t i = 0; i < n; ++i) cosmos::update_element<true>(c, t, p[i], g[i], m[i], v[i], ema[i]);
}

COSMOS_CLONES void update_without_ema(const cosmos::AdamwEmaConstants& constants,
                                      const cosmos::AdamwEmaTensorConstants& of_tensor, float* __restrict p,
                                      const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n) {
  const cosmos::AdamwEmaConstants c = constants;
  const cosmos::AdamwEmaTensorConstants t = of_tensor;
  float unused = 0.0f;
  for (int64_t i = 0; i < n; ++i) cosmos::update_element<false>(c, t, p[i], g[i], m[i], v[i], unused);
}

/* Round to nearest, ties to even; every NaN becomes torch's. */
COSMOS_CLONES void round_to_bf16(const float* __restrict x, uint16_t* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

void clamp(float* x, int64_t n, float low, float high) {
  for (int64_t i = 0; i < n; ++i) x[i] = cosmos::clamp(x[i], low, high);
}

void update_range(const CosmosAdamwEmaTensors& t, const cosmos::AdamwEmaConstants& c,
                  const cosmos::AdamwEmaTensorConstants& of_tensor, size_t tensor, int64_t begin, int64_t n) {
  float* p = t.param[tensor] + begin;
  const float* g = t.grad[tensor] + begin;
  float* m = t.exp_avg[tensor] + begin;
  float* v = t.exp_avg_sq[tensor] + begin;
  float* ema = t.ema != nullptr ? t.ema[tensor] + begin : nullptr;
  if (ema != nullptr) {
    update_with_ema(c, of_tensor, p, g, m, v, ema, n);
  } else {
    update_without_ema(c, of_tensor, p, g, m, v, n);
  }
  if (t.clamped != nullptr && t.clamped[tensor] != 0) {
    clamp(p, n, c.low, c.high);
    if (ema != nullptr) clamp(ema, n, c.low, c.high);
  }
  if (t.param_copy != nullptr) round_to_bf16(p, t.param_copy[tensor] + begin, n);
  if (t.ema_copy != nullptr) round_to_bf16(ema, t.ema_copy[tensor] + begin, n);
}

/* Sum of squares of one chunk, in an order that depends on the length alone: the same bits on every instruction set.
 *
 * A chunk is read as 8 streams at once: one stream a thread leaves a third of the memory's bandwidth unused on the
 * processors tried. 8 lanes a stream, flushed into double every 64 additions. */
COSMOS_CLONES double sum_of_squares(const float* x, int64_t n) {
  constexpr int64_t kStreams = 8, kLanes = 8, kFlush = 64 * kLanes;
  const int64_t stride = n / (kStreams * kLanes) * kLanes; /* elements of a stream */
  double total = 0.0;
  for (int64_t i = 0; i < stride;) {
    float lanes[kStreams * kLanes] = {};
    const int64_t end = std::min(i + kFlush, stride);
    for (; i < end; i += kLanes)
      for (int64_t s = 0; s < kStreams; ++s)
        for (int64_t j = 0; j < kLanes; ++j) {
          const float value = x[s * stride + i + j];
          lanes[s * kLanes + j] += value * value;
        }
    for (const float lane : lanes) total += static_cast<double>(lane);
  }
  for (int64_t i = kStreams * stride; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return total;
}

}  // namespace

COSMOS_EXPORT int32_t cosmos_abi_version() { return COSMOS_ABI_VERSION; }

/* The instruction set that the loader picked, for `cosmos-fast doctor`. */
COSMOS_EXPORT const char* cosmos_cpu_isa() {
#if defined(COSMOS_TARGET_CLONES)
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "baseline";
}

COSMOS_EXPORT int32_t cosmos_cpu_openmp() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

/* Chunks are taken from the last to the first: the norm has just read the gradients in ascending order, and those read
 * last may still be in the cache. */
COSMOS_EXPORT int32_t cosmos_adamw_ema_cpu(const CosmosAdamwEmaTensors* tensors, const CosmosAdamwEmaOptions* options,
                                           int32_t threads) {
  if (!cosmos::valid(tensors, options) || threads < 1) return COSMOS_BAD_ARGUMENT;
  try {
    const CosmosAdamwEmaTensors t = *tensors;
    const cosmos::AdamwEmaConstants c = cosmos::constants(*options);
    std::vector<cosmos::AdamwEmaTensorConstants> of_tensor(static_cast<size_t>(t.tensors));
    for (int64_t i = 0; i < t.tensors; ++i)
      of_tensor[static_cast<size_t>(i)] = cosmos::tensor_constants(*options, t, i);
    const Chunks chunks(t.sizes, t.tensors);
    const int64_t count = chunks.count();
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (count > 1)
    for (int64_t k = 0; k < count; ++k) {
      const Chunks::Range r = chunks[count - 1 - k];
      for (int64_t done = 0; done < r.length; done += kBlock)
        update_range(t, c, of_tensor[r.tensor], r.tensor, r.begin + done, std::min(kBlock, r.length - done));
    }
  } catch (const std::bad_alloc&) {
    return COSMOS_NO_MEMORY;
  }
  return COSMOS_OK;
}

/* sum over all elements of all arrays of x^2, into *result. */
COSMOS_EXPORT int32_t cosmos_sum_of_squares_cpu(const float* const* arrays, const int64_t* sizes, int64_t tensors,
                                                int32_t threads, double* result) {
  if (tensors < 0 || threads < 1 || result == nullptr) return COSMOS_BAD_ARGUMENT;
  try {
    const Chunks chunks(sizes, tensors);
    const int64_t count = chunks.count();
    std::vector<double> partial(static_cast<size_t>(count), 0.0);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (count > 1)
    for (int64_t k = 0; k < count; ++k) {
      const Chunks::Range r = chunks[k];
      partial[static_cast<size_t>(k)] = sum_of_squares(arrays[r.tensor] + r.begin, r.length);
    }
    double total = 0.0;
    for (const double value : partial) total += value;
    *result = total;
  } catch (const std::bad_alloc&) {
    return COSMOS_NO_MEMORY;
  }
  return COSMOS_OK;
}
