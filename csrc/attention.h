// Attention of one head within a window: integer product of queries and keys,
// softmax, quantization of the probabilities, float product with the values.
// Queries are processed a few rows at a time, so that the full attention map is
// never stored.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "norm.h"

namespace {

constexpr int GROUP = 4;        // inputs whose weights lie side by side

inline int up_to_columns(int count) {
  return (count + COLUMNS - 1) / COLUMNS * COLUMNS;
}

// Codes of one head, its keys packed as weights, and its values decoded.
struct Head {
  const uint8_t *query, *key, *value;  // [positions], `channels` bytes apart
  uint8_t *output;             // likewise
  int8_t *packed_keys;
  int32_t *correction;         // [columns], added to the products with each key
  float *values;               // [width / 16, rounded up][positions][16]
};

// Logits of `count` queries, which are replaced by quantized probabilities.
struct Scores {
  int first, count;       // queries first .. first + count - 1
  int positions, columns; // number of keys, and that rounded up to blocks
  float *row;             // [count][columns]
  const float *bias;      // that of query first + i begins at i * bias_pitch
  int64_t bias_pitch;
};

// Pack keys as the weights of a product, and compute the term that the zero
// point of the queries adds to the products with each key.
template <class Weight>
void pack_keys(const isvit_block &block, const Head &head, int positions,
               int width) {
  for (int j = 0; j < up_to_columns(positions); j++) {
    const uint8_t *key = head.key + (int64_t)j * block.channels;
    const int column = j % COLUMNS;
    Weight *to = (Weight *)head.packed_keys + (int64_t)(j - column) * width;
    int sum = 0;
    for (int c = 0; c < width; c++) {
      const int weight = j < positions ? key[c] - block.key_center : 0;
      const int k = c % GROUP, group = (c - k) * COLUMNS;
      sum += weight;
      to[sizeof(Weight) == 1
             ? group + column * GROUP + k
             : group + (k % 2 * COLUMNS + column) * 2 + k / 2] = (Weight)weight;
    }
    head.correction[j] = -block.query_codes.zero_point * sum;
  }
}

void decode_values(const isvit_block &block, const Head &head, int positions,
                   int width) {
  const Ints zero_point = splat(block.value_codes.zero_point);
  for (int j = 0; j < positions; j++) {
    const uint8_t *value = head.value + (int64_t)j * block.channels;
    float *to = head.values + (int64_t)j * COLUMNS;
    // Columns beyond the width may hold anything: their sums are not used.
    for (int c = 0; c < width; c += COLUMNS)
      store16(to + (int64_t)c * positions,
              to_float(load_codes(value + c) - zero_point));
  }
}

// Compute logits, up to a constant for each query: softmax ignores those.
void find_logits(const isvit_block &block, const Head &head,
                 const Scores &scores, int width) {
  isvit_product product = {};
  product.weight = head.packed_keys;
  product.runs = block.key_runs;
  product.num_runs = block.num_key_runs;
  product.block_bytes = COLUMNS * width * block.key_bytes;
  const int64_t segment = 0;
  const Floats scale = splat(block.logit_scale);
  for (int first = 0; first < scores.count; first += PANEL) {
    const uint8_t *rows[PANEL];
    const int count = std::min(PANEL, scores.count - first);
    for (int i = 0; i < count; i++)
      rows[i] = head.query +
                (int64_t)(scores.first + first + i) * block.channels;
    for (int j = 0; j < scores.columns; j += COLUMNS) {
      const Ints16 added = load16<Ints>(head.correction + j);
      const float *bias = scores.bias + first * scores.bias_pitch + j;
      float *to = scores.row + (int64_t)first * scores.columns + j;
      multiply_block(
          rows, count, &segment, product, j / COLUMNS,
          [&](int i, const Ints16 &sums) ISVIT_INLINE {
            store16(to + (int64_t)i * scores.columns,
                    multiply_add(
                        to_float(sums + added), scale,
                        load16<Floats>(bias + i * scores.bias_pitch)));
          });
    }
  }
}

// Softmax of each row of logits; its probabilities are quantized and decoded.
ISVIT_APART void quantize_rows(const isvit_block &block, const Scores &scores,
                               const int32_t *region) {
  const int vectors = (scores.positions + LANES - 1) / LANES;
  const Steps steps(block.attention);
  for (int i = 0; i < scores.count; i++) {
    float *row = scores.row + (int64_t)i * scores.columns;
    if (region != nullptr) {
      // As in Swin, other regions get -100, but no -inf.
      const Ints own = splat(region[scores.first + i]);
      for (int j = 0; j < scores.columns; j += LANES) {
        const Ints apart = (Ints)(load<Ints>(region + j) != own);
        store(row + j, load<Floats>(row + j) + to_float(apart) * 100.f);
      }
    }
    Floats highest = load<Floats>(row);
    for (int t = 1; t < vectors; t++)
      highest = larger(highest, load<Floats>(row + t * LANES));
    float maximum = highest[0];
    for (int i = 1; i < LANES; i++) maximum = std::max(maximum, highest[i]);
    // Summed in sixteen lanes on every CPU, so that all round alike.
    Floats16 sum = {};
    for (int t = 0; t < vectors; t += PARTS)
      repeat<PARTS>([&](auto j) ISVIT_INLINE {
        if (t + j >= vectors) return;
        float *at = row + (t + j) * LANES;
        const Floats power = exponential(load<Floats>(at) - maximum);
        store(at, power);
        sum.part[j] += power;
      });
    const float inverse = 1.f / total(sum);
    for (int t = 0; t < vectors; t++) {
      float *at = row + t * LANES;
      store(at, steps(load<Floats>(at) * inverse));
    }
  }
}

// Attention outputs of ROWS queries in sixteen channels from `first` on, as
// codes: sums of the values, weighted by the probabilities.
template <int ROWS>
inline void mix_values(const isvit_block &block, const Head &head,
                       const Scores &scores, const Encoder<false> &encode,
                       int row, int first, int width) {
  const float *weights = scores.row + (int64_t)row * scores.columns;
  const float *value = head.values + (int64_t)first * scores.positions;
  Floats16 sum[ROWS] = {};
  for (int j = 0; j < scores.positions; j++, value += COLUMNS) {
    const Floats16 values = load16<Floats>(value);
    repeat<ROWS>([&](auto i) ISVIT_INLINE {
      const Floats weight = splat(weights[(int64_t)i * scores.columns + j]);
      sum[i] = multiply_add(weight, values, sum[i]);
    });
  }
  repeat<ROWS>([&](auto i) ISVIT_INLINE {
    uint8_t *to = head.output + first +
                  (int64_t)(scores.first + row + i) * block.channels;
    const Floats16 mean = sum[i] * block.value_scale;
    if (first + COLUMNS <= width) return encode(mean, to);
    uint8_t codes[COLUMNS];
    encode(mean, codes);
    std::copy(codes, codes + width - first, to);
  });
}

ISVIT_APART void mix_all(const isvit_block &block, const Head &head,
                         const Scores &scores, int width) {
  const Encoder<false> encode(block.proj_input);
  for (int c = 0; c < width; c += COLUMNS) {
    int i = 0;
    for (; i + 6 <= scores.count; i += 6)
      mix_values<6>(block, head, scores, encode, i, c, width);
    for (; i + 2 <= scores.count; i += 2)
      mix_values<2>(block, head, scores, encode, i, c, width);
    if (i < scores.count)
      mix_values<1>(block, head, scores, encode, i, c, width);
  }
}

void attend(const isvit_block &block, const Head &head, const Scores &scores,
            const int32_t *region, int width) {
  find_logits(block, head, scores, width);
  quantize_rows(block, scores, region);
  mix_all(block, head, scores, width);
}

// Compute the bias that decomposed relative positions add to the logits of one
// query: the sum of one term for the row and one for the column of the key
// (MViTv2, arXiv 2112.01526, eq. 4; used by ViTDet, arXiv 2203.16527).
void find_relative_bias(const isvit_windows &windows, const float *query,
                        int width, int position, float *line, float *bias) {
  const int height = windows.height, across = windows.width;
  float *by_row = line, *by_column = line + up_to_columns(height);
  const auto weigh = [&](const float *table, int length, int place,
                         float *to) {
    const int pitch = up_to_columns(2 * length + COLUMNS);
    for (int k = 0; k < length; k += COLUMNS) {
      Floats16 sum = {};
      for (int d = 0; d < width; d++) {
        const Floats16 entry = load16<Floats>(
            table + (int64_t)d * pitch + length - 1 - place + k);
        sum = multiply_add(splat(query[d]), entry, sum);
      }
      store16(to + k, sum);
    }
  };
  weigh(windows.relative_rows, height, position / across, by_row);
  weigh(windows.relative_columns, across, position % across, by_column);
  // What is written beyond the end of a row, the next row overwrites.
  for (int y = 0; y < height; y++)
    for (int x = 0; x < across; x += COLUMNS)
      store16(bias + y * across + x,
              load16<Floats>(by_column + x) + by_row[y]);
  const int keys = height * across;
  std::fill(bias + keys, bias + up_to_columns(keys), -1e30f);
}

}  // namespace
