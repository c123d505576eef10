// Integer matrix product of rows of codes and a layer's packed weights.
//
// `multiply_block` multiplies up to PANEL rows by one block of 16 outputs and
// passes the int32 sums of each row to an epilogue of the caller: `Affine`
// makes them floats, `Encoder` quantizes those. Callers loop over the blocks
// for one panel of rows, which stays in the L2 cache while a block is in L1.
#pragma once

#include "tile.h"

namespace {

constexpr int PANEL = 48;

// Set `sums` of as many of num_rows rows as a tile holds to those over one run,
// or add these to them. Returns the number of rows.
ISVIT_APART int sum_tile(
    const uint8_t *const *rows, int num_rows, const int64_t *segments,
    const isvit_run &run, const int8_t *weight, bool is_first, int32_t *sums) {
  const auto sum_rows = [&](auto count) ISVIT_INLINE {
    constexpr int ROWS = count;
    Ints16 sum[ROWS];
    if (ROWS <= WIDE_ROWS && run.is_wide)
      sum_groups(rows, segments, run, weight, 128, sum, add_wide_group);
    else
      sum_run<ROWS>(rows, segments, run, weight, sum);
    repeat<ROWS>([&](auto i) ISVIT_INLINE {
      int32_t *to = sums + i * COLUMNS;
      store16(to, is_first ? sum[i] : sum[i] + load16<Ints>(to));
    });
    return ROWS;
  };
  if (num_rows >= TILE_ROWS && !run.is_wide)
    return sum_rows(Constant<TILE_ROWS>());
  if (num_rows >= 4) return sum_rows(Constant<4>());
  if (num_rows >= 2) return sum_rows(Constant<2>());
  return sum_rows(Constant<1>());
}

// Call use(r, sums) with the sums of row r, for r in 0 .. num_rows - 1.
//
// rows: first code of each of at most PANEL rows; segments: as in isvit_rows.
// The weights of a block are aligned to 64 bytes.
template <class Use>
inline ISVIT_INLINE void multiply_block(
    const uint8_t *const *rows, int num_rows, const int64_t *segments,
    const isvit_product &product, int block, Use &&use) {
  alignas(64) int32_t sums[PANEL * COLUMNS];
  const int8_t *weight = product.weight + (int64_t)block * product.block_bytes;
  for (int k = 0; k < product.num_runs; k++) {
    const isvit_run &run = product.runs[k];
    for (int first = 0, r = 0; r < num_rows; first = r) {
      r += sum_tile(rows + r, num_rows - r, segments, run, weight, k == 0,
                    sums + r * COLUMNS);
      // Tile by tile, so that stores to memory overlap with products.
      if (k + 1 == product.num_runs)
        for (; first < r; first++)
          use(first, load16<Ints>(sums + first * COLUMNS));
    }
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

}  // namespace
