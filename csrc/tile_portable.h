// Sums of a tile in plain C++, the reference of every other kernel.
namespace {

constexpr int TILE_ROWS = 4;

template <int ROWS>
inline ISVIT_INLINE Sums<ROWS> sum_run(
    const uint8_t *const *rows, const int64_t *segments, const isvit_run &run,
    const int8_t *weight) {
  int32_t sums[ROWS][COLUMNS] = {};
  for (int s = run.segment; s < run.segment + run.segments; s++) {
    int64_t at = segments[s] + run.offset;
    for (int g = 0; g < run.groups; g++, at += 4, weight += 64)
      for (int i = 0; i < ROWS; i++) {
        const uint8_t *codes = rows[i] + at;
        for (int n = 0; n < COLUMNS; n++)
          for (int k = 0; k < 4; k++)
            sums[i][n] += codes[k] * weight[4 * n + k];
      }
  }
  return load<Sums<ROWS>>(sums);
}

}  // namespace
