// Sums of a tile with vpdpbusd, which adds four products to an int32 lane, so
// that no sum can overflow and a run is only a range of addresses.
namespace {

#if defined(__AVX512VNNI__)
constexpr int TILE_ROWS = 12;
#else
constexpr int TILE_ROWS = 6;
#endif

inline Ints add_products(Ints sums, Ints codes, Ints weights) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes,
                                   (__m512i)weights);
#else
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes,
                                       (__m256i)weights);
#endif
}

template <int ROWS>
inline ISVIT_INLINE void sum_run(
    const uint8_t *const *rows, const int64_t *segments, const isvit_run &run,
    const int8_t *weight, Ints16 (&sums)[ROWS]) {
  repeat<ROWS>([&](auto i) ISVIT_INLINE { sums[i] = {}; });
  for (int s = run.segment; s < run.segment + run.segments; s++) {
    int64_t at = segments[s] + run.offset;
    for (int g = 0; g < run.groups; g++, at += 4, weight += 64) {
      Ints weights[PARTS];
      repeat<PARTS>([&](auto j) ISVIT_INLINE {
        weights[j] = load<Ints>(weight + 4 * LANES * j);
      });
      repeat<ROWS>([&](auto i) ISVIT_INLINE {
        const Ints codes = splat(load<int32_t>(rows[i] + at));
        repeat<PARTS>([&](auto j) ISVIT_INLINE {
          Ints &sum = sums[i].part[j];
          sum = add_products(sum, codes, weights[j]);
        });
      });
    }
  }
}

}  // namespace
