// Sums of the products of a tile, a few rows of codes and 16 outputs, over the
// inputs of one run. TILE_ROWS is the number of rows whose sums fit registers.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace {

// Call add(sum, codes, weight) for every row and group of four inputs of a run,
// with where the group's codes and its weights, of `bytes` bytes, begin.
template <int ROWS, class Add>
inline ISVIT_INLINE void sum_groups(
    const uint8_t *const *rows, const int64_t *segments, const isvit_run &run,
    const int8_t *weight, int bytes, Ints16 (&sums)[ROWS], Add &&add) {
  repeat<ROWS>([&](auto i) ISVIT_INLINE { sums[i] = {}; });
  for (int s = run.segment; s < run.segment + run.segments; s++) {
    int64_t at = segments[s] + run.offset;
    for (const int64_t end = at + 4 * run.groups; at < end; at += 4) {
      repeat<ROWS>(
          [&](auto i) ISVIT_INLINE { add(sums[i], rows[i] + at, weight); });
      weight += bytes;
    }
  }
}

// The four codes of a group in every lane.
inline ISVIT_INLINE Ints spread_codes(const uint8_t *codes) {
  Ints spread = splat(load<int32_t>(codes));
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Keeps the compiler from working on the scalar and then copying the result.
  asm("" : "+x"(spread));
#endif
  return spread;
}

// Weights of 16 bits: exact whatever codes and weights are.
constexpr int WIDE_ROWS = 4;

inline ISVIT_INLINE void add_wide_group(
    Ints16 &sum, const uint8_t *codes, const int8_t *weight) {
  const int32_t *pairs = (const int32_t *)weight;
  const Ints spread = spread_codes(codes);
  sum = sum + map16(multiply_pairs, spread & 0xFF00FF, load16<Ints>(pairs));
  sum = sum + map16(multiply_pairs, (spread >> 8) & 0xFF00FF,
                    load16<Ints>(pairs + COLUMNS));
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
// Products are accumulated in int16 lanes, which are widened to int32 at the
// end of a run. Runs are chosen so that no int16 sum can overflow
// (isvit_det/runtime/overflow.py has the proof).
constexpr int TILE_ROWS = 6;

template <int ROWS>
inline ISVIT_INLINE void sum_run(
    const uint8_t *const *rows, const int64_t *segments, const isvit_run &run,
    const int8_t *weight, Ints16 (&sums)[ROWS]) {
  __m256i low[ROWS], high[ROWS];
  repeat<ROWS>([&](auto i) ISVIT_INLINE {
    low[i] = high[i] = _mm256_setzero_si256();
  });
  const auto add_group = [&](int64_t at, auto k) ISVIT_INLINE {
    const __m256i first = load<__m256i>(weight + 64 * k);
    const __m256i second = load<__m256i>(weight + 64 * k + 32);
    // Assembly, since compilers load ahead and spill accumulators.
    repeat<ROWS>([&](auto i) ISVIT_INLINE {
      __m256i codes, products;
      asm("vpbroadcastd %[row], %[codes]\n\t"
          "vpmaddubsw %[first], %[codes], %[products]\n\t"
          "vpaddw %[products], %[low], %[low]\n\t"
          "vpmaddubsw %[second], %[codes], %[codes]\n\t"
          "vpaddw %[codes], %[high], %[high]"
          : [codes] "=&x"(codes), [products] "=&x"(products),
            [low] "+x"(low[i]), [high] "+x"(high[i])
          : [row] "m"(*(const int32_t *)(rows[i] + at + 4 * k)),
            [first] "x"(first), [second] "x"(second));
    });
  };
  for (int s = run.segment; s < run.segment + run.segments; s++) {
    int64_t at = segments[s] + run.offset;
    const int64_t end = at + 4 * run.groups;
    for (; at + 4 < end; at += 8, weight += 128) {
      add_group(at, Constant<0>());
      add_group(at, Constant<1>());
    }
    if (at == end) continue;
    add_group(at, Constant<0>());
    weight += 64;
  }
  const __m256i ones = _mm256_set1_epi16(1);
  repeat<ROWS>([&](auto i) ISVIT_INLINE {
    sums[i].part[0] = (Ints)_mm256_madd_epi16(low[i], ones);
    sums[i].part[1] = (Ints)_mm256_madd_epi16(high[i], ones);
  });
}

#else
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// vpdpbusd adds four products to an int32 lane, so that no sum can overflow and
// a run is only a range of addresses.
inline ISVIT_INLINE Ints add_products(Ints sums, Ints codes, Ints weights) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes,
                                   (__m512i)weights);
#else
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes,
                                       (__m256i)weights);
#endif
}
constexpr int TILE_ROWS = LANES == 16 ? 12 : 6;
#else
// Plain C++, the reference for all other kernels.
inline ISVIT_INLINE Ints add_products(Ints sums, Ints codes, Ints weights) {
  for (int k = 0; k < 32; k += 8)
    sums += (codes >> k & 255) * (weights << (24 - k) >> 24);
  return sums;
}
constexpr int TILE_ROWS = 4;
#endif

template <int ROWS>
inline ISVIT_INLINE void sum_run(
    const uint8_t *const *rows, const int64_t *segments, const isvit_run &run,
    const int8_t *weight, Ints16 (&sums)[ROWS]) {
  sum_groups(rows, segments, run, weight, 64, sums,
             [](Ints16 &sum, const uint8_t *codes, const int8_t *weight)
                 ISVIT_INLINE {
    sum = map16(add_products, sum, spread_codes(codes),
                load16<Ints>((const int32_t *)weight));
  });
}

#endif

}  // namespace
