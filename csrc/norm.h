// LayerNorm of one token, quantized without storing the float result.
#pragma once

#include <cmath>

#include "blocks.h"
#include "encoder.h"

namespace {

// Sum of sixteen numbers, in an order that does not depend on LANES.
inline float total(const Floats16 &x) {
  typedef float Four __attribute__((vector_size(16)));
  float lane[COLUMNS];
  store16(lane, x);
  const Four sum = (load<Four>(lane) + load<Four>(lane + 8)) +
                   (load<Four>(lane + 4) + load<Four>(lane + 12));
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

inline void norm_codes(const isvit_norm &norm, const Encoder<false> &encode,
                       const float *x, uint8_t *codes) {
  const int channels = norm.channels;
  Floats16 sum = {};
  for (int c = 0; c < channels; c += COLUMNS)
    sum = sum + load16<Floats>(x + c);
  const float mean = total(sum) / channels;
  sum = {};
  for (int c = 0; c < channels; c += COLUMNS) {
    const Floats16 deviation = load16<Floats>(x + c) - mean;
    sum = sum + deviation * deviation;
  }
  const float factor = 1.f / std::sqrt(total(sum) / channels + norm.eps);
  for (int c = 0; c < channels; c += COLUMNS) {
    const Floats16 normal = (load16<Floats>(x + c) - mean) * factor;
    const Floats16 weight = load16<Floats>(norm.weight + c);
    encode(normal * weight + load16<Floats>(norm.bias + c), codes + c);
  }
}

}  // namespace
