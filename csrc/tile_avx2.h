// Sums of a tile on AVX2: products are accumulated in int16 lanes, which are
// widened to int32 at the end of a run. Runs are chosen so that no int16 sum
// can overflow (isvit_det/runtime/overflow.py has the proof).
namespace {

constexpr int TILE_ROWS = 6;

template <int ROWS>
inline ISVIT_INLINE void sum_run(
    const uint8_t *const *rows, const int64_t *segments, const isvit_run &run,
    const int8_t *weight, Ints16 (&sums)[ROWS]) {
  __m256i low[ROWS], high[ROWS];
  const uint8_t *row[ROWS];
  repeat<ROWS>([&](auto i) ISVIT_INLINE {
    low[i] = high[i] = _mm256_setzero_si256();
    row[i] = rows[i];
  });
  const int64_t ahead = (int64_t)64 * run.segments * run.groups;
  for (int s = run.segment; s < run.segment + run.segments; s++) {
    int64_t at = segments[s] + run.offset;
    for (const int64_t end = at + 4 * run.groups; at < end; at += 4) {
      const __m256i first = _mm256_load_si256((const __m256i *)weight);
      const __m256i second = _mm256_load_si256((const __m256i *)weight + 1);
      // The weights of the next run or block may not be cached yet.
      if (ROWS == TILE_ROWS)
        _mm_prefetch((const char *)weight + ahead, _MM_HINT_T0);
      weight += 64;
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
            : [row] "m"(*(const int32_t *)(row[i] + at)), [first] "x"(first),
              [second] "x"(second));
      });
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
  repeat<ROWS>([&](auto i) ISVIT_INLINE {
    sums[i].part[0] = (Ints)_mm256_madd_epi16(low[i], ones);
    sums[i].part[1] = (Ints)_mm256_madd_epi16(high[i], ones);
  });
}

}  // namespace
