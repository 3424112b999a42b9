/* Fused AdamW + exponential moving average (EMA): the C interface, and the arithmetic that CPU and CUDA share.
 *
 * One pass over memory. For every element, with p the parameter before the step:
 *
 *     ema <- ema + (1 - ema_decay) * (p - ema)
 *     g'  <- grad_scale * g
 *     m   <- m + (1 - beta1) * (g' - m)
 *     v   <- beta2 * v + (1 - beta2) * g' * g'
 *     p   <- (1 - lr * weight_decay) * p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
 *
 * 36 bytes of traffic per fp32 element: four arrays read and written, the gradient read. NaN and Inf pass through.
 */
#ifndef COSMOS_ADAMW_EMA_H
#define COSMOS_ADAMW_EMA_H

#include <cmath>

#include "cosmos.h"

/* Hyper-parameters as the caller knows them; derived constants are computed in double, once per call. */
struct CosmosAdamwEmaOptions {
  double lr, beta1, beta2, eps, weight_decay, ema_decay, grad_scale;
  int64_t step; /* 1 for the first update */
};

/* `tensors` arrays of fp32, contiguous; array i holds sizes[i] elements. ema may be null: then there is no EMA. */
struct CosmosAdamwEmaTensors {
  int64_t tensors;
  float* const* param;
  const float* const* grad;
  float* const* exp_avg;
  float* const* exp_avg_sq;
  float* const* ema;
  const int64_t* sizes;
};

namespace cosmos {

/* The per-element constants of one step, in single precision. */
struct AdamwEmaConstants {
  float grad_scale, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inv_sqrt_correction2, eps, one_minus_ema;
};

inline AdamwEmaConstants constants(const CosmosAdamwEmaOptions& o) {
  const double step = static_cast<double>(o.step);
  AdamwEmaConstants c;
  c.grad_scale = static_cast<float>(o.grad_scale);
  c.one_minus_beta1 = static_cast<float>(1.0 - o.beta1);
  c.beta2 = static_cast<float>(o.beta2);
  c.one_minus_beta2 = static_cast<float>(1.0 - o.beta2);
  c.decay = static_cast<float>(1.0 - o.lr * o.weight_decay);
  c.step_size = static_cast<float>(o.lr / (1.0 - std::pow(o.beta1, step)));
  c.inv_sqrt_correction2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, step)));
  c.eps = static_cast<float>(o.eps);
  c.one_minus_ema = static_cast<float>(1.0 - o.ema_decay);
  return c;
}

template <bool kEma>
COSMOS_INLINE void update_element(const AdamwEmaConstants& c, float& p, float g, float& m, float& v, float& ema) {
  if (kEma) ema = ema + c.one_minus_ema * (p - ema);
  g = c.grad_scale * g;
  m = m + c.one_minus_beta1 * (g - m);
  v = c.beta2 * v + c.one_minus_beta2 * (g * g);
  p = c.decay * p - c.step_size * (m / (sqrtf(v) * c.inv_sqrt_correction2 + c.eps));
}

inline bool valid(const CosmosAdamwEmaTensors* t, const CosmosAdamwEmaOptions* o) {
  return t != nullptr && o != nullptr && t->tensors >= 0 && o->step >= 1;
}

}  // namespace cosmos

#endif /* COSMOS_ADAMW_EMA_H */
