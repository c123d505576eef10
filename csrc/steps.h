// Step functions, evaluated by binary search in all lanes at once. The code of
// a function's value, such as GELU or a logarithm, is a step function of its
// argument, and comparing is cheaper than computing the function.
#pragma once

#include "gemm.h"
#include "blocks.h"

namespace {

// table[index], with indices in 0 .. 15.
inline Floats pick(const Floats16 &table, Ints index) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table.part[0]);
#elif defined(__AVX2__)
  const __m256i i = (__m256i)index;
  return (Floats)_mm256_blendv_ps(
      _mm256_permutevar8x32_ps((__m256)table.part[0], i),
      _mm256_permutevar8x32_ps((__m256)table.part[1], i),
      _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
#else
  float entries[COLUMNS];
  store16(entries, table);
  Floats found;
  for (int i = 0; i < LANES; i++) found[i] = entries[index[i]];
  return found;
#endif
}

// The same where all indices are known to lie in 0 .. 7 (HIGH = 0) or 8 .. 15.
template <int HIGH>
inline Floats pick_half(const Floats16 &table, Ints index) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Floats)_mm256_permutevar8x32_ps((__m256)table.part[HIGH],
                                          (__m256i)index);
#else
  return pick(table, index);
#endif
}

inline Floats gather(const float *table, Ints index) {
  Floats found;
  for (int i = 0; i < LANES; i++) found[i] = table[index[i]];
  return found;
}

// Sixteen steps, held in registers. The limits are a binary search tree in heap
// order; a comparison that holds is -1, so i -> 2 i - (x >= limit) descends it.
struct SmallSteps {
  Floats root;
  Floats16 limits, values;

  explicit SmallSteps(const isvit_steps &steps)
      : root(splat(steps.limits[1])), limits(load16<Floats>(steps.limits)),
        values(load16<Floats>(steps.values)) {}

  ISVIT_INLINE Floats operator()(Floats x) const {
    Ints i = 2 - (Ints)(x >= root);
    i = i + i - (Ints)(x >= pick_half<0>(limits, i));
    i = i + i - (Ints)(x >= pick_half<0>(limits, i));
    return pick(values, i + i - (Ints)(x >= pick_half<1>(limits, i)) - 16);
  }
};

// Any number of steps, read from memory.
struct LargeSteps {
  const isvit_steps &steps;
  Floats operator()(Floats x) const {
    Ints i = splat(1);
    for (int level = 0; level < steps.depth; level++)
      i = i + i - (Ints)(x >= gather(steps.limits, i));
    return gather(steps.values, i - (1 << steps.depth));
  }
};

// Codes of gelu(y), or their entries: the value of the step that y lies in.
struct GeluSteps {
  SmallSteps steps;
  Floats left;
  Ints left_code;

  explicit GeluSteps(const isvit_gelu &gelu)
      : steps(gelu.steps), left(splat(gelu.left)),
        left_code(splat(gelu.left_code)) {}

  ISVIT_INLINE void operator()(const Floats16 &y, uint8_t *to) const {
    store_codes(to, map16([&](Floats v) ISVIT_INLINE {
      return v < left ? left_code : whole(steps(v));
    }, y));
  }
};

// Codes of gelu(y), computed where there are too many steps.
struct GeluEncoder {
  Encoder<false> encode;

  explicit GeluEncoder(const isvit_gelu &gelu) : encode(gelu.quantizer) {}

  ISVIT_INLINE void operator()(const Floats16 &y, uint8_t *to) const {
    encode(map16([](Floats v) ISVIT_INLINE { return gelu(v); }, y), to);
  }
};

}  // namespace
