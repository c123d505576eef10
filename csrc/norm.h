// LayerNorm of one token, quantized without storing the float result.
#pragma once

#include <cmath>

#include "blocks.h"
#include "encoder.h"

namespace {

// Sum of sixteen numbers, in an order that does not depend on LANES.
inline float total(const Floats16 &x) {
  float lane[COLUMNS];
  store16(lane, x);
  for (int half = COLUMNS / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
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
