// Quantization of sixteen floats at a time to codes, or to a table's entries.
#pragma once

#include "steps.h"

namespace {

constexpr float ZEROS[COLUMNS] = {};
constexpr isvit_steps NO_STEPS = {ZEROS, ZEROS, 0};

// Without steps, maps are divided by the scale, exactly as the simulation does
// it; a layer's outputs are multiplied by its inverse, which is faster.
template <bool DIVIDE>
class Encoder {
 public:
  const int depth;  // of the steps; 0: there are none

  explicit Encoder(const isvit_quantizer &q)
      : depth(q.steps.depth), factor_(splat(DIVIDE ? q.scale : 1.f / q.scale)),
        low_(splat((float)-q.zero_point)),
        high_(splat((float)(q.top - q.zero_point))),
        zero_point_(splat(q.zero_point)), steps_(depth ? q.steps : NO_STEPS) {
    const float *values = steps_.all.values;
    values_[0] = narrow(map16(whole, load16<Floats>(values)));
    if (depth > 4) values += COLUMNS;
    values_[1] = narrow(map16(whole, load16<Floats>(values)));
  }

  ISVIT_INLINE void operator()(const Floats16 &x, uint8_t *to) const {
    store(to, depth == 0   ? by_scale(x)
              : depth == 4 ? pick(values_[0], find<4>(x))
              : depth == 5 ? pick(values_, find<5>(x))
                           : by_steps(x));
  }

 private:
  ISVIT_INLINE Bytes by_scale(const Floats16 &x) const {
    return narrow(map16([&](Floats v) ISVIT_INLINE {
      // Clamped first, since the range of `nearest` is limited.
      const Floats scaled = DIVIDE ? v / factor_ : v * factor_;
      return nearest(smaller(larger(scaled, low_), high_)) + zero_point_;
    }, x));
  }
  template <int LEVELS>
  ISVIT_INLINE Bytes find(const Floats16 &x) const {
    return narrow(map16([&](Floats v) ISVIT_INLINE {
      return steps_.find<LEVELS>(v);
    }, x));
  }
  ISVIT_APART Bytes by_steps(const Floats16 &x) const {
    return narrow(map16([&](Floats v) { return whole(steps_(v)); }, x));
  }

  Floats factor_, low_, high_;
  Ints zero_point_;
  Steps steps_;
  Bytes values_[2];  // of the first 32 steps
};

// Quantizes gelu(y), which is computed unless steps are those of y.
struct GeluEncoder {
  Encoder<false> encode;

  explicit GeluEncoder(const isvit_quantizer &q) : encode(q) {}

  ISVIT_INLINE void operator()(Floats16 y, uint8_t *to) const {
    if (encode.depth == 0)
      y = map16([](Floats v) ISVIT_INLINE { return gelu(v); }, y);
    encode(y, to);
  }
};

}  // namespace
