/* Fused AdamW + EMA: the interface that both libraries share, and the arithmetic of one element.
 *
 * For every element, with `grad_scale` s already folded with the clipping factor:
 *     ema <- ema + (1 - ema_decay) * (p - ema)                     p from BEFORE the step
 *     g'  = s * g
 *     m   <- m + (1 - beta1) * (g' - m)
 *     v   <- beta2 * v + (1 - beta2) * g' * g'
 *     p   <- (1 - lr * weight_decay) * p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
 * and then, where asked for: p and ema clamped to [low, high], and both rounded to bf16 copies.
 *
 * 36 bytes of traffic per fp32 element: four arrays read and written, the gradient read; 2 more per copy, 4 more where
 * the norm of the gradients is computed before. NaN and Inf pass through, unless the caller asks for the step to be
 * left out when the norm is not finite.
 */
#ifndef COSMOS_ADAMW_EMA_H
#define COSMOS_ADAMW_EMA_H

#include <cmath>

#include "cosmos.h"

/* Hyper-parameters as the caller knows them; derived constants are computed in double, once per tensor and call. */
struct CosmosAdamwEmaOptions {
  double lr, beta1, beta2, eps, ema_decay;
  double grad_scale;
  double clip_norm; /* CUDA: gradients are scaled to at most this norm; negative: no clipping. CPU: in grad_scale */
  double low, high; /* of the clamped tensors */
  int32_t skip_nonfinite; /* CUDA: nothing is written where the norm is NaN or Inf. CPU: the caller's affair */
};

/* `tensors` arrays of fp32, contiguous; array i holds sizes[i] elements. */
struct CosmosAdamwEmaTensors {
  int64_t tensors;
  float* const* param;
  const float* const* grad;
  float* const* exp_avg;
  float* const* exp_avg_sq;
  float* const* ema;            /* null: no average */
  uint16_t* const* param_copy;  /* bf16 copies of param; null: none */
  uint16_t* const* ema_copy;    /* bf16 copies of ema; null: none */
  const int64_t* sizes;
  const int64_t* step;          /* of tensor i; 1 for its first update */
  const double* weight_decay;   /* of tensor i */
  const uint8_t* clamped;       /* tensor i is clamped to [low, high] where not 0; null: none */
};

namespace cosmos {

/* What all elements of a call have in common, in single precision. */
struct AdamwEmaConstants {
  float grad_scale, one_minus_beta1, beta2, one_minus_beta2, eps, one_minus_ema, low, high;
};

/* What the elements of one tensor have in common besides: its decay and its bias corrections. */
struct AdamwEmaTensorConstants {
  float decay, step_size, inv_sqrt_correction2;
};

inline AdamwEmaConstants constants(const CosmosAdamwEmaOptions& o) {
  AdamwEmaConstants c;
  c.grad_scale = static_cast<float>(o.grad_scale);
  c.one_minus_beta1 = static_cast<float>(1.0 - o.beta1);
  c.beta2 = static_cast<float>(o.beta2);
  c.one_minus_beta2 = static_cast<float>(1.0 - o.beta2);
  c.eps = static_cast<float>(o.eps);
  c.one_minus_ema = static_cast<float>(1.0 - o.ema_decay);
  c.low = static_cast<float>(o.low);
  c.high = static_cast<float>(o.high);
  return c;
}

inline AdamwEmaTensorConstants tensor_constants(const CosmosAdamwEmaOptions& o, const CosmosAdamwEmaTensors& t,
                                                int64_t i) {
  const double step = static_cast<double>(t.step[i]);
  AdamwEmaTensorConstants c;
  c.decay = static_cast<float>(1.0 - o.lr * t.weight_decay[i]);
  c.step_size = static_cast<float>(o.lr / (1.0 - std::pow(o.beta1, step)));
  c.inv_sqrt_correction2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, step)));
  return c;
}

template <bool kEma>
COSMOS_INLINE void update_element(const AdamwEmaConstants& c, const AdamwEmaTensorConstants& t, float& p, float g,
                                  float& m, float& v, float& ema) {
  if (kEma) ema = ema + c.one_minus_ema * (p - ema);
  g = c.grad_scale * g;
  m = m + c.one_minus_beta1 * (g - m);
  v = c.beta2 * v + c.one_minus_beta2 * (g * g);
  p = t.decay * p - t.step_size * (m / (sqrtf(v) * t.inv_sqrt_correction2 + c.eps));
}

/* NaN stays NaN. */
COSMOS_INLINE float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

/* Null pointers and steps before the first are refused. */
inline bool valid(const CosmosAdamwEmaTensors* t, const CosmosAdamwEmaOptions* o) {
  if (t == nullptr || o == nullptr || t->tensors < 0) return false;
  if (t->tensors > 0 && (t->step == nullptr || t->weight_decay == nullptr || t->sizes == nullptr)) return false;
  if (t->ema == nullptr && t->ema_copy != nullptr) return false;
  for (int64_t i = 0; i < t->tensors; ++i)
    if (t->step[i] < 1) return false;
  return true;
}

}  // namespace cosmos

#endif /* COSMOS_ADAMW_EMA_H */
