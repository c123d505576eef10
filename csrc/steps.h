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

// Finds the step of each number among 2^DEPTH, 16 or 32, whose limits are held
// in registers. The result has the step's number in its low DEPTH bits.
template <int DEPTH>
struct Tree {
  Floats root;
  Floats16 limits, lowest;

  explicit Tree(const float *from)
      : root(splat(from[1])), limits(load16<Floats>(from)),
        lowest(load16<Floats>(from + (DEPTH == 5 ? 16 : 0))) {}

  ISVIT_INLINE Ints operator()(Floats x) const {
    // A comparison that holds is -1, so i -> 2 i - (x >= limit) descends.
    Ints i = 2 - (Ints)(x >= root);
    i = i + i - (Ints)(x >= pick_half<0>(limits, i));
    i = i + i - (Ints)(x >= pick_half<0>(limits, i));
    i = i + i - (Ints)(x >= pick_half<1>(limits, i));
    return DEPTH == 4 ? i : i + i - (Ints)(x >= pick(lowest, i));
  }
};

// Sixteen steps of floats.
struct SmallSteps {
  Tree<4> tree;
  Floats16 values;

  explicit SmallSteps(const isvit_steps &steps)
      : tree(steps.limits), values(load16<Floats>(steps.values)) {}

  ISVIT_INLINE Floats operator()(Floats x) const {
    return pick(values, tree(x));
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

// Up to 2^DEPTH steps of bytes: codes, or entries of a table.
template <int DEPTH>
struct StepCodes {
  Tree<DEPTH> tree;
  Bytes values[DEPTH - 3] = {};

  explicit StepCodes(const isvit_steps &steps)
      : tree(steps.limits ? steps.limits : NONE) {
    if (steps.limits == nullptr) return;
    for (int k = 0; k < DEPTH - 3; k++)
      values[k] = narrow(map16(whole, load16<Floats>(steps.values + 16 * k)));
  }

  ISVIT_INLINE void operator()(const Floats16 &x, uint8_t *to) const {
    const Bytes step = narrow(map16(tree, x));
    const Bytes found = pick(values[0], step);
    store(to, DEPTH == 4 ? found
                         : step & 16 ? pick(values[DEPTH - 4], step) : found);
  }

  static constexpr float NONE[1 << DEPTH] = {};
};

}  // namespace
