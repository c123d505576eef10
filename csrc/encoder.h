// Quantization of sixteen floats at a time, and of their GELU.
#pragma once

#include "steps.h"

namespace {

// Codes, or the table entries nearest to the floats. Maps are divided by the
// scale, exactly as the simulation does it; a layer's outputs are multiplied by
// its inverse, which is faster.
template <bool DIVIDE>
struct Encoder {
  Floats factor, low, high;
  Ints zero_point;
  const uint8_t *entries;
  bool is_stepped;
  StepCodes<4> steps;

  explicit Encoder(const isvit_quantizer &q)
      : entries(q.entries), is_stepped(q.steps.depth == 4), steps(q.steps) {
    const float step = entries ? .5f * q.scale : q.scale;
    const int32_t zero = entries ? 2 * q.zero_point : q.zero_point;
    factor = splat(DIVIDE ? step : 1.f / step);
    low = splat((float)-zero);
    high = splat((float)(q.top - zero));
    zero_point = splat(zero);
  }

  ISVIT_INLINE void operator()(const Floats16 &x, uint8_t *to) const {
    if (is_stepped) return steps(x, to);
    store(to, narrow(map16([&](Floats v) ISVIT_INLINE {
      // Clamped first, since the range of `nearest` is limited.
      const Floats scaled = DIVIDE ? v / factor : v * factor;
      const Floats inside = smaller(larger(scaled, low), high);
      Ints code = nearest(inside);
      // Cells begin at integers, so that they are found by rounding down.
      if (entries != nullptr) code += (Ints)(to_float(code) > inside);
      return code + zero_point;
    }, x)));
    if (entries != nullptr)
      for (int i = 0; i < COLUMNS; i++) to[i] = entries[to[i]];
  }
};

// Codes of gelu(y), computed where there are too many steps.
struct GeluEncoder {
  Encoder<false> encode;

  explicit GeluEncoder(const isvit_quantizer &q) : encode(q) {}

  ISVIT_INLINE void operator()(const Floats16 &y, uint8_t *to) const {
    encode(map16([](Floats v) ISVIT_INLINE { return gelu(v); }, y), to);
  }
};

}  // namespace
