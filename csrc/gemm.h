// Integer matrix product of rows of codes and a layer's packed weights.
//
// `multiply_block` multiplies up to PANEL rows by one block of 16 outputs and
// passes the int32 sums of each row to an epilogue of the caller while they are
// still in registers: `Affine` makes them the layer's float outputs, `Encoder`
// quantizes those. Callers loop over the blocks of a layer for one panel of
// rows, so that the panel stays in the L2 cache and a block in L1.
#pragma once

#include "tile.h"

namespace {

constexpr int PANEL = 48;

template <int ROWS, class Use>
inline ISVIT_INLINE void multiply_tile(
    const uint8_t *const *rows, const int64_t *segments, const isvit_run &run,
    const int8_t *weight, int32_t *partial, bool is_first, bool is_last,
    int first_row, Use &&use) {
  Ints16 sums[ROWS];
  if (ROWS <= WIDE_ROWS && run.is_wide)
    sum_groups(rows, segments, run, weight, 128, sums, add_wide_group);
  else
    sum_run<ROWS>(rows, segments, run, weight, sums);
  repeat<ROWS>([&](auto i) ISVIT_INLINE {
    Ints16 &sum = sums[i];
    int32_t *before = partial + i * COLUMNS;
    if (!is_first) sum = sum + load16<Ints>(before);
    if (is_last)
      use(first_row + i, sum);
    else
      store16(before, sum);
  });
}

// Call use(r, sums) with the sums of row r, for r in 0 .. num_rows - 1.
//
// rows: first code of each of at most PANEL rows; segments: as in isvit_rows.
// The weights of a block are aligned to 64 bytes.
template <class Use>
inline ISVIT_INLINE void multiply_block(
    const uint8_t *const *rows, int num_rows, const int64_t *segments,
    const isvit_product &product, int block, Use &&use) {
  alignas(64) int32_t partial[PANEL * COLUMNS];
  const int8_t *weight = product.weight + (int64_t)block * product.block_bytes;
  for (int k = 0; k < product.num_runs; k++) {
    const isvit_run &run = product.runs[k];
    const bool is_first = k == 0, is_last = k + 1 == product.num_runs;
    int r = 0;
    const auto next_tile = [&](auto tile_rows) ISVIT_INLINE {
      multiply_tile<tile_rows>(rows + r, segments, run, weight,
                               partial + r * COLUMNS, is_first, is_last, r,
                               use);
      r += tile_rows;
    };
    while (!run.is_wide && r + TILE_ROWS <= num_rows)
      next_tile(Constant<TILE_ROWS>());
    while (r + 4 <= num_rows) next_tile(Constant<4>());
    if (r + 2 <= num_rows) next_tile(Constant<2>());
    if (r < num_rows) next_tile(Constant<1>());
    weight += (int64_t)(run.is_wide ? 128 : 64) * run.segments * run.groups;
  }
}

// Float outputs of a layer from the integer sums of one block.
struct Affine {
  Ints16 correction;
  Floats16 scale, bias;

  Affine(const isvit_product &product, int block)
      : correction(load16<Ints>(product.correction + block * COLUMNS)),
        scale(load16<Floats>(product.scale + block * COLUMNS)),
        bias(load16<Floats>(product.bias + block * COLUMNS)) {}

  ISVIT_INLINE Floats16 operator()(const Ints16 &sums) const {
    return multiply_add(to_float(sums + correction), scale, bias);
  }
};

// Quantizes sixteen floats to codes, or to the table entries nearest to them.
// Maps are divided by the scale, exactly as the simulation does it; a layer's
// outputs are multiplied by its inverse, which is faster.
template <bool DIVIDE>
struct Encoder {
  Floats factor, low, high;
  Ints zero_point;
  const uint8_t *entries;

  explicit Encoder(const isvit_quantizer &q) : entries(q.entries) {
    const float step = entries ? .5f * q.scale : q.scale;
    const int32_t zero = entries ? 2 * q.zero_point : q.zero_point;
    factor = splat(DIVIDE ? step : 1.f / step);
    low = splat((float)-zero);
    high = splat((float)(q.top - zero));
    zero_point = splat(zero);
  }

  ISVIT_INLINE void operator()(const Floats16 &x, uint8_t *to) const {
    store_codes(to, map16([&](Floats v) ISVIT_INLINE {
      // Clamped first, since the range of `nearest` is limited.
      const Floats steps = DIVIDE ? v / factor : v * factor;
      const Floats inside = smaller(larger(steps, low), high);
      Ints code = nearest(inside);
      // Cells begin at integers, so that they are found by rounding down.
      if (entries != nullptr) code += (Ints)(to_float(code) > inside);
      return code + zero_point;
    }, x));
    if (entries != nullptr)
      for (int i = 0; i < COLUMNS; i++) to[i] = entries[to[i]];
  }
};

}  // namespace
