/* What the calls of both directions of the pooling share: sizes, the check of them, and the choice of a kernel. */
#ifndef COSMOS_POOL_CALL_H
#define COSMOS_POOL_CALL_H

#include "launch.h"

/* The tokens may be strided, by multiples of 8 elements; all else is contiguous. Everything aligned to 16 bytes. */
struct CosmosPoolShape {
  int64_t batch, length, rows, dim;   /* B, L (at most 256), M of a sample, D (a multiple of 8) */
  int64_t batch_stride, token_stride; /* of the tokens, in elements */
  float eps;                          /* of their LayerNorm */
};

namespace cosmos {
namespace pool {

inline bool valid(const CosmosPoolShape& s) {
  constexpr int64_t kMost = INT64_C(1) << 31; /* blocks of a launch; the factors first, so that no product overflows */
  return s.batch >= 1 && s.batch < kMost && s.rows >= 1 && s.rows < kMost && s.batch * s.rows < kMost &&
         s.length >= 1 && s.length <= 256 && s.dim >= 1 && s.dim <= (1 << 20) && s.dim % 8 == 0 &&
         s.batch_stride % 8 == 0 && s.token_stride % 8 == 0;
}

template <template <Dtype, int> class Kernel, Dtype kType, typename Call>
int32_t run_type(const Call& call, void* stream) {
  if (call.shape.length <= 64) return Kernel<kType, 64>::run(call, stream);
  if (call.shape.length <= 128) return Kernel<kType, 128>::run(call, stream);
  return Kernel<kType, 256>::run(call, stream);
}

/* Kernel<type, tokens>::run of the smallest tile that holds all tokens of a sample. dtype: 0 for fp16, 1 for bf16.
 * Returns COSMOS_OK, COSMOS_BAD_ARGUMENT or a cudaError_t. */
template <template <Dtype, int> class Kernel, typename Call>
int32_t run(const Call* call, int32_t dtype, int64_t most_rows, void* stream) {
  if (call == nullptr || !valid(call->shape) || call->shape.rows > most_rows || dtype < 0 || dtype > 1)
    return COSMOS_BAD_ARGUMENT;
  return static_cast<Dtype>(dtype) == Dtype::kHalf ? run_type<Kernel, Dtype::kHalf>(*call, stream)
                                                   : run_type<Kernel, Dtype::kBfloat16>(*call, stream);
}

}  // namespace pool
}  // namespace cosmos

#endif /* COSMOS_POOL_CALL_H */
