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

// The upper levels of a tree, held in registers.
struct Tree {
  Floats root;
  Floats16 limits, fifth;  // those of the first four levels, and the fifth

  explicit Tree(const isvit_steps &steps)
      : root(splat(steps.limits[1])), limits(load16<Floats>(steps.limits)),
        fifth(load16<Floats>(steps.limits + (steps.depth > 4 ? 16 : 0))) {}

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
};

// Sixteen steps.
struct SmallSteps {
  Tree tree;
  Floats16 values;

  explicit SmallSteps(const isvit_steps &steps)
      : tree(steps), values(load16<Floats>(steps.values)) {}

  ISVIT_INLINE Floats operator()(Floats x) const {
    return pick(values, tree.find<4>(x));
  }
};

// More steps, whose lower levels are read from memory.
struct LargeSteps {
  Tree tree;
  const isvit_steps &steps;

  explicit LargeSteps(const isvit_steps &all) : tree(all), steps(all) {}

  ISVIT_INLINE Floats operator()(Floats x) const {
    Ints i = tree.find<5>(x);
    for (int level = 5; level < steps.depth; level++)
      i = i + i - (Ints)(x >= gather(steps.limits, i));
    return gather(steps.values, i - (1 << steps.depth));
  }
};

}  // namespace
