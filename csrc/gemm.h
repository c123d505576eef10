// Rows of codes times the packed weights of a layer, in exact integers.
//
// A block is 16 outputs of a layer. `multiply_block` multiplies up to PANEL
// rows by one block and hands the int32 sums of each row to a function of the
// caller, which does with them what it likes while they are in registers:
// an `Affine` makes the layer's real outputs of them, an `Encoder` codes.
// A caller walks the blocks of a layer for one panel of rows, so that the
// panel stays in the second-level cache and a block in the first.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace {

template <int ROWS>
struct Sums { Ints16 row[ROWS]; };

}  // namespace

// TILE_ROWS, the rows that are summed in registers at once, and sum_run<ROWS>,
// the integer sums of ROWS rows and 16 outputs over one run.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include "tile_vnni.h"
#elif defined(__AVX2__)
#include "tile_avx2.h"
#else
#include "tile_portable.h"
#endif

namespace {

constexpr int PANEL = 48;

template <int ROWS, class Use>
inline ISVIT_INLINE void multiply_tile(
    const uint8_t *const *rows, const int64_t *segments, const isvit_run &run,
    const int8_t *weight, int32_t *partial, bool is_first, bool is_last,
    int first_row, Use &&use) {
  Sums<ROWS> sums = sum_run<ROWS>(rows, segments, run, weight);
  repeat<ROWS>([&](auto i) ISVIT_INLINE {
    repeat<PARTS>([&](auto j) ISVIT_INLINE {
      int32_t *before = partial + i * COLUMNS + j * LANES;
      Ints &sum = sums.row[i].part[j];
      if (!is_first) sum += load<Ints>(before);
      if (run.shift != 0) sum <<= run.shift;
      if (!is_last) store(before, sum);
    });
    if (is_last) use(first_row + i, sums.row[i]);
  });
}

// Call use(r, sums) with the sums of row r, for r in 0 .. num_rows - 1.
//
// rows: starts of the rows, at most PANEL; segments: as in isvit_rows;
// weight: the block's packed weights, aligned to 64 bytes.
template <class Use>
inline ISVIT_INLINE void multiply_block(
    const uint8_t *const *rows, int num_rows, const int64_t *segments,
    const isvit_product &product, int block, Use &&use) {
  alignas(64) int32_t partial[PANEL * COLUMNS];
  const int8_t *weight = product.weight + (int64_t)block * product.groups * 64;
  for (int k = 0; k < product.num_runs; k++) {
    const isvit_run &run = product.runs[k];
    const bool is_first = k == 0, is_last = k + 1 == product.num_runs;
    int r = 0;
#define ISVIT_TILE(ROWS)                                                     \
  multiply_tile<ROWS>(rows + r, segments, run, weight,                       \
                      partial + r * COLUMNS, is_first, is_last, r, use),     \
      r += ROWS
    while (r + TILE_ROWS <= num_rows) ISVIT_TILE(TILE_ROWS);
    while (r + 4 <= num_rows) ISVIT_TILE(4);
    if (r + 2 <= num_rows) ISVIT_TILE(2);
    if (r < num_rows) ISVIT_TILE(1);
#undef ISVIT_TILE
    weight += (int64_t)64 * run.segments * run.groups;
  }
}

// Real outputs of a layer from the integer sums of one block.
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

// Codes of sixteen reals, or the entries that they index. The codes of a map
// are made by division, which is what the simulation does, those of a layer's
// outputs by multiplication.
template <bool DIVIDE>
struct Encoder {
  Floats factor, low, high;
  Ints zero_point;
  const uint8_t *entries;

  explicit Encoder(const isvit_quantizer &q)
      : factor(splat(DIVIDE ? q.scale : 1.f / q.scale)),
        low(splat((float)-q.zero_point)),
        high(splat((float)(q.top - q.zero_point))),
        zero_point(splat(q.zero_point)), entries(q.entries) {}

  // Rounding and clamping to whole numbers commute.
  ISVIT_INLINE Ints encode(Floats x) const {
    const Floats steps = DIVIDE ? x / factor : x * factor;
    return nearest(smaller(larger(steps, low), high)) + zero_point;
  }
  ISVIT_INLINE void operator()(const Floats16 &x, uint8_t *to) const {
    store_codes(to, map16([&](Floats v) ISVIT_INLINE { return encode(v); }, x));
    if (entries != nullptr)
      for (int i = 0; i < COLUMNS; i++) to[i] = entries[to[i]];
  }
};

}  // namespace
