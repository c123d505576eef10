// Step functions, evaluated by binary search in all lanes at once. The code of
// a function's value, such as GELU or a logarithm, is a step function of its
// argument, and comparing is cheaper than computing the function.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace {

// table[index % 16] of each index.
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
  for (int i = 0; i < LANES; i++) found[i] = entries[index[i] & 15];
  return found;
#endif
}

// The same where index % 16 is known to lie in 0 .. 7 (HIGH = 0) or 8 .. 15.
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

// The upper levels of the tree are held in registers, the others in memory.
struct Steps {
  Floats root;
  Floats16 limits, fifth, values;  // of the first four levels and the fifth
  const isvit_steps &all;

  explicit Steps(const isvit_steps &steps)
      : root(splat(steps.limits[1])), limits(load16<Floats>(steps.limits)),
        fifth(load16<Floats>(steps.limits + (steps.depth > 4 ? 16 : 0))),
        values(load16<Floats>(steps.values)), all(steps) {}

  // Index of the node, or the step, that is reached LEVELS levels down.
  template <int LEVELS>
  ISVIT_INLINE Ints find(Floats x) const {
    // A comparison that holds is -1, so i -> 2 i - (x >= limit) descends.
    Ints i = 2 - (Ints)(x >= root);
    i = i + i - (Ints)(x >= pick_half<0>(limits, i));
    i = i + i - (Ints)(x >= pick_half<0>(limits, i));
    i = i + i - (Ints)(x >= pick_half<1>(limits, i));
    return LEVELS == 4 ? i : i + i - (Ints)(x >= pick(fifth, i));
  }

  ISVIT_INLINE Floats operator()(Floats x) const {
    if (all.depth == 4) return pick(values, find<4>(x));
    Ints i = find<5>(x);
    for (int level = 5; level < all.depth; level++)
      i = i + i - (Ints)(x >= gather(all.limits, i));
    return gather(all.values, i - (1 << all.depth));
  }
};

}  // namespace
