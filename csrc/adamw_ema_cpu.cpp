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

constexpr int64_t kChunk = 1 << 15; /* 32 Ki elements: 640 KiB over the five arrays, a few microseconds of work */

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

COSMOS_CLONES void update_with_ema(const cosmos::AdamwEmaConstants& constants, float* __restrict p,
                                   const float* __restrict g, float* __restrict m, float* __restrict v,
                                   float* __restrict ema, int64_t n) {
  const cosmos::AdamwEmaConstants c = constants; /* a local copy: the compiler may keep it in registers */
  for (int64_t i = 0; i < n; ++i) cosmos::update_element<true>(c, p[i], g[i], m[i], v[i], ema[i]);
}

COSMOS_CLONES void update_without_ema(const cosmos::AdamwEmaConstants& constants, float* __restrict p,
                                      const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n) {
  const cosmos::AdamwEmaConstants c = constants;
  float unused = 0.0f;
  for (int64_t i = 0; i < n; ++i) cosmos::update_element<false>(c, p[i], g[i], m[i], v[i], unused);
}

/* Sum of squares of one chunk. 64 partial sums in a fixed order (the same bits on every instruction set), flushed into
 * double every 4096 elements: at most 64 additions in single precision go into one partial sum. */
COSMOS_CLONES double sum_of_squares(const float* x, int64_t n) {
  constexpr int64_t kLanes = 64, kFlush = 4096;
  double total = 0.0;
  int64_t i = 0;
  while (i + kLanes <= n) {
    float lanes[kLanes] = {};
    const int64_t end = std::min(i + kFlush, n - (n % kLanes));
    for (; i < end; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
    for (int64_t j = 0; j < kLanes; ++j) total += static_cast<double>(lanes[j]);
  }
  for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
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

COSMOS_EXPORT int32_t cosmos_adamw_ema_cpu(const CosmosAdamwEmaTensors* tensors, const CosmosAdamwEmaOptions* options,
                                           int32_t threads) {
  if (!cosmos::valid(tensors, options) || threads < 1) return COSMOS_BAD_ARGUMENT;
  try {
    const CosmosAdamwEmaTensors t = *tensors;
    const cosmos::AdamwEmaConstants c = cosmos::constants(*options);
    const Chunks chunks(t.sizes, t.tensors);
    const int64_t count = chunks.count();
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (count > 1)
    for (int64_t k = 0; k < count; ++k) {
      const Chunks::Range r = chunks[k];
      float* p = t.param[r.tensor] + r.begin;
      const float* g = t.grad[r.tensor] + r.begin;
      float* m = t.exp_avg[r.tensor] + r.begin;
      float* v = t.exp_avg_sq[r.tensor] + r.begin;
      if (t.ema != nullptr) {
        update_with_ema(c, p, g, m, v, t.ema[r.tensor] + r.begin, r.length);
      } else {
        update_without_ema(c, p, g, m, v, r.length);
      }
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
