/* CPU library: self-attention of packed sequences, its heads shared out among threads.
 *
 * Tasks write to rows and channels of their own: results do not depend on the number of threads. They do depend on the
 * instruction set, in the last bits (fused multiply-add).
 */
#include "attention_cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <new>
#include <vector>

namespace {

constexpr int64_t kLanes = 8; /* of small_products.h, which only code for one instruction set may include */

#ifdef COSMOS_AVX2
const bool kHasAvx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
const auto kForward = kHasAvx2 ? cosmos::avx2::forward_head : cosmos::baseline::forward_head;
const auto kBackward = kHasAvx2 ? cosmos::avx2::backward_head : cosmos::baseline::backward_head;
#else
const auto kForward = cosmos::baseline::forward_head;
const auto kBackward = cosmos::baseline::backward_head;
#endif

int64_t thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

bool valid(const CosmosAttention* a, int32_t threads) {
  return a != nullptr && threads >= 1 && a->sequences >= 0 && a->heads >= 1 && a->width >= kLanes &&
         a->width % kLanes == 0;
}

int64_t longest(const int32_t* cu, int64_t sequences) {
  int64_t found = 0;
  for (int64_t i = 0; i < sequences; ++i) found = std::max<int64_t>(found, cu[i + 1] - cu[i]);
  return found;
}

template <typename Task>
int32_t run(const CosmosAttention& a, int32_t threads, const Task& task) {
  const int64_t tasks = a.sequences * a.heads;
  const int64_t queries = longest(a.cu_queries, a.sequences);
  const int64_t keys = (longest(a.cu_keys, a.sequences) + kLanes - 1) / kLanes * kLanes;
  const int64_t columns = keys * a.width, weights = keys * queries, total = columns + 2 * weights;
  try { /* no thread may throw: all room is taken before */
    std::vector<float> floats(static_cast<size_t>(threads * total));
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (tasks > 1)
    for (int64_t i = 0; i < tasks; ++i) {
      float* own = floats.data() + thread_number() * total;
      task(i, cosmos::AttentionRoom{own, own + columns, own + columns + weights});
    }
  } catch (const std::bad_alloc&) {
    return COSMOS_NO_MEMORY;
  }
  return COSMOS_OK;
}

}  // namespace

/* out: [queries, heads * width], contiguous. lse: [queries, heads]. */
COSMOS_EXPORT int32_t cosmos_attention_forward_cpu(const CosmosAttention* attention, float* out, float* lse,
                                                   int32_t threads) {
  if (!valid(attention, threads)) return COSMOS_BAD_ARGUMENT;
  return run(*attention, threads, [=](int64_t task, const cosmos::AttentionRoom& room) {
    kForward(*attention, task, room, out, lse);
  });
}

COSMOS_EXPORT int32_t cosmos_attention_backward_cpu(const CosmosAttention* attention, const CosmosAttentionGrads* grads,
                                                    int32_t threads) {
  if (!valid(attention, threads) || grads == nullptr) return COSMOS_BAD_ARGUMENT;
  return run(*attention, threads, [=](int64_t task, const cosmos::AttentionRoom& room) {
    kBackward(*attention, *grads, task, room);
  });
}
