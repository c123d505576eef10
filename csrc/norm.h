// LayerNorm of a row of floats, straight to codes.
#ifndef ISVIT_NORM_H
#define ISVIT_NORM_H

#include <cmath>

#include "gemm.h"
#include "blocks.h"

namespace {

// Sum of sixteen lanes, in an order that does not depend on LANES.
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
  for (int c = 0; c < channels; c += COLUMNS) {
    const Floats16 value = load16<Floats16>(x + c);
    repeat<PARTS>(
        [&](auto j) ISVIT_INLINE { sum.part[j] += value.part[j]; });
  }
  const float mean = total(sum) / channels;
  sum = {};
  for (int c = 0; c < channels; c += COLUMNS) {
    const Floats16 value = load16<Floats16>(x + c);
    repeat<PARTS>([&](auto j) ISVIT_INLINE {
      const Floats away = value.part[j] - mean;
      sum.part[j] += away * away;
    });
  }
  const float factor = 1.f / std::sqrt(total(sum) / channels + norm.eps);
  for (int c = 0; c < channels; c += COLUMNS) {
    Floats16 value = load16<Floats16>(x + c);
    const Floats16 weight = load16<Floats16>(norm.weight + c);
    const Floats16 bias = load16<Floats16>(norm.bias + c);
    repeat<PARTS>([&](auto j) ISVIT_INLINE {
      value.part[j] =
          (value.part[j] - mean) * factor * weight.part[j] + bias.part[j];
    });
    encode(value, codes + c);
  }
}

}  // namespace

#endif
