// Sums of a tile in plain C++, the reference for all other kernels.
namespace {

constexpr int TILE_ROWS = 4;

template <int ROWS>
inline ISVIT_INLINE void sum_run(
    const uint8_t *const *rows, const int64_t *segments, const isvit_run &run,
    const int8_t *weight, Ints16 (&sums)[ROWS]) {
  int32_t sum[ROWS][COLUMNS] = {};
  for (int s = run.segment; s < run.segment + run.segments; s++) {
    int64_t at = segments[s] + run.offset;
    for (int g = 0; g < run.groups; g++, at += 4, weight += 64)
      for (int i = 0; i < ROWS; i++) {
        const uint8_t *codes = rows[i] + at;
        for (int n = 0; n < COLUMNS; n++)
          for (int k = 0; k < 4; k++)
            sum[i][n] += codes[k] * weight[4 * n + k];
      }
  }
  std::memcpy(sums, sum, sizeof sum);
}

}  // namespace
