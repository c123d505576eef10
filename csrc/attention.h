// Attention of one head among the positions of a window: integer products of
// queries and keys, softmax, quantized probabilities, products with values.
#ifndef ISVIT_ATTENTION_H
#define ISVIT_ATTENTION_H

#include <algorithm>

#include "norm.h"
#include "steps.h"

namespace {

constexpr int GROUP = 4;
constexpr int MAX_WIDTH = 256;  // of a head

inline int up_to_columns(int count) {
  return (count + COLUMNS - 1) / COLUMNS * COLUMNS;
}

// Codes and memory of one head, whose rows lie `pitch` apart.
struct Head {
  const uint8_t *query, *key, *value;
  int pitch;
  const float *position_bias;
  const int32_t *region;  // of every position; null if there is only one
  uint8_t *output;        // codes, rows `channels` apart
  int8_t *packed_keys;
  float *probabilities;   // [positions][columns]
  float *values;          // [positions][width up to columns]
};

// One part of a key's codes less the center, and the sum of them.
int center_key(const uint8_t *key, int width, int center, int8_t *part) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef uint16_t Pairs __attribute__((vector_size(16)));
  Pairs sums = {};
  int c = 0;
  for (; c + 16 <= width; c += 16) {
    const Bytes codes = load<Bytes>(key + c);
    store(part + c, codes - (uint8_t)center);
    sums += ((Pairs)codes & 255) + ((Pairs)codes >> 8);
  }
  int sum = -width * center;
  for (int i = 0; i < 8; i++) sum += sums[i];
  for (; c < width; c++) {
    part[c] = (int8_t)(key[c] - center);
    sum += key[c];
  }
  return sum;
}

// The same in two parts, 16 * high + low.
int split_key(const uint8_t *key, int width, int center, int8_t *high,
              int8_t *low) {
  int sum = 0;
  for (int c = 0; c < width; c++) {
    const int weight = key[c] - center;
    high[c] = (int8_t)((weight + 8) >> 4);
    low[c] = (int8_t)(weight - 16 * high[c]);
    sum += weight;
  }
  return sum;
}

// Keys as the weights of a product; also what the zero point of the queries
// adds to the products with each key.
void pack_keys(const isvit_swin_block &block, const Head &head, int width,
               int32_t *correction) {
  const int groups = width / GROUP, step = groups * COLUMNS * GROUP;
  const int columns = up_to_columns(block.positions);
  int8_t part[2][MAX_WIDTH] = {};
  for (int j = 0; j < columns; j++) {
    int8_t *to = head.packed_keys +
                 (int64_t)(j / COLUMNS) * block.key_parts * step +
                 j % COLUMNS * GROUP;
    const uint8_t *key = head.key + (int64_t)j * head.pitch;
    int sum = 0;
    if (j >= block.positions)
      std::fill(part[0], part[2], 0);
    else if (block.key_parts == 1)
      sum = center_key(key, width, block.key_center, part[0]);
    else
      sum = split_key(key, width, block.key_center, part[0], part[1]);
    correction[j] = -block.query_codes.zero_point * sum;
    for (int p = 0; p < block.key_parts; p++)
      for (int g = 0; g < groups; g++)
        std::memcpy(to + p * step + g * COLUMNS * GROUP, part[p] + GROUP * g,
                    GROUP);
  }
}

// Logits of all pairs of positions. What is equal for all keys of a query is
// left out, since softmax takes no notice of it.
void find_logits(const isvit_swin_block &block, const Head &head, int width,
                 int32_t *correction) {
  const int columns = up_to_columns(block.positions);
  isvit_product product = {};
  product.weight = head.packed_keys;
  product.runs = block.key_runs;
  product.num_runs = block.num_key_runs;
  product.groups = block.key_parts * width / GROUP;
  const int64_t segment = 0;
  const Floats scale = splat(block.logit_scale);
  for (int first = 0; first < block.positions; first += PANEL) {
    const uint8_t *rows[PANEL];
    const int count = std::min(PANEL, block.positions - first);
    for (int i = 0; i < count; i++)
      rows[i] = head.query + (int64_t)(first + i) * head.pitch;
    for (int j = 0; j < columns; j += COLUMNS) {
      const Ints16 added = load16<Ints16>(correction + j);
      const float *bias = head.position_bias + first * columns + j;
      float *to = head.probabilities + first * columns + j;
      multiply_block(
          rows, count, &segment, product, j / COLUMNS,
          [&](int i, const Ints16 &sums) ISVIT_INLINE {
            const Floats16 b = load16<Floats16>(bias + i * columns);
            Floats16 logit;
            repeat<PARTS>([&](auto k) ISVIT_INLINE {
              logit.part[k] =
                  to_float(sums.part[k] + added.part[k]) * scale + b.part[k];
            });
            store16(to + i * columns, logit);
          });
    }
  }
}

// Softmax of one row of logits, and the quantized values of its probabilities.
template <class Steps>
inline void quantize_row(float *row, int vectors, const Steps &steps) {
  Floats highest = load<Floats>(row);
  for (int t = 1; t < vectors; t++)
    highest = larger(highest, load<Floats>(row + t * LANES));
  float maximum = highest[0];
  for (int i = 1; i < LANES; i++) maximum = std::max(maximum, highest[i]);
  // Lanes are summed as if there were always sixteen.
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

template <class Steps>
void quantize_rows(const isvit_swin_block &block, const Head &head) {
  const int columns = up_to_columns(block.positions);
  const int vectors = (block.positions + LANES - 1) / LANES;
  const Steps steps(block.attention);
  for (int i = 0; i < block.positions; i++) {
    float *row = head.probabilities + i * columns;
    if (head.region != nullptr) {
      const Ints own = splat(head.region[i]);
      for (int j = 0; j < columns; j += LANES) {
        const Ints apart = (Ints)(load<Ints>(head.region + j) != own);
        store(row + j, load<Floats>(row + j) + to_float(apart) * 100.f);
      }
    }
    quantize_row(row, vectors, steps);
  }
}

// Sums of values weighted by the probabilities of ROWS positions, for 2 * 16
// or 16 columns, then their codes.
template <int ROWS, int BLOCKS>
inline void mix_values(const isvit_swin_block &block, const Head &head,
                       const Encoder<false> &encode, int position, int first,
                       int width) {
  const int columns = up_to_columns(block.positions);
  const int pitch = up_to_columns(width);
  const float *weights = head.probabilities + position * columns;
  constexpr int VECTORS = BLOCKS * PARTS;
  Floats sum[ROWS][VECTORS] = {};
  for (int j = 0; j < block.positions; j++) {
    const float *value = head.values + j * pitch + first;
    Floats part[VECTORS];
    repeat<VECTORS>([&](auto k) ISVIT_INLINE {
      part[k] = load<Floats>(value + k * LANES);
    });
    repeat<ROWS>([&](auto i) ISVIT_INLINE {
      const Floats weight = splat(weights[i * columns + j]);
      repeat<VECTORS>(
          [&](auto k) ISVIT_INLINE { sum[i][k] += weight * part[k]; });
    });
  }
  repeat<ROWS>([&](auto i) ISVIT_INLINE {
    uint8_t *to = head.output + (int64_t)(position + i) * block.channels;
    repeat<BLOCKS>([&](auto b) ISVIT_INLINE {
      const int at = first + b * COLUMNS;
      Floats16 mixed;
      repeat<PARTS>([&](auto k) ISVIT_INLINE {
        mixed.part[k] = sum[i][b * PARTS + k] * block.value_scale;
      });
      if (at + COLUMNS <= width) return encode(mixed, to + at);
      uint8_t codes[COLUMNS];
      encode(mixed, codes);
      std::copy(codes, codes + width - at, to + at);
    });
  });
}

void mix_all(const isvit_swin_block &block, const Head &head, int width) {
  const int pitch = up_to_columns(width);
  const Ints zero_point = splat(block.value_codes.zero_point);
  for (int j = 0; j < block.positions; j++) {
    const uint8_t *value = head.value + (int64_t)j * head.pitch;
    float *to = head.values + j * pitch;
    // Columns beyond the width hold anything: their sums are not used.
    for (int c = 0; c < width; c += COLUMNS) {
      const Ints16 codes = load_codes(value + c);
      Floats16 reals;
      repeat<PARTS>([&](auto k) ISVIT_INLINE {
        reals.part[k] = to_float(codes.part[k] - zero_point);
      });
      store16(to + c, reals);
    }
  }
  const Encoder<false> encode(block.proj_input);
  for (int c = 0; c < pitch;) {
    const bool is_wide = c + 2 * COLUMNS <= pitch;
    int i = 0;
    for (; i + 2 <= block.positions; i += 2)
      is_wide ? mix_values<2, 2>(block, head, encode, i, c, width)
              : mix_values<2, 1>(block, head, encode, i, c, width);
    if (i < block.positions)
      is_wide ? mix_values<1, 2>(block, head, encode, i, c, width)
              : mix_values<1, 1>(block, head, encode, i, c, width);
    c += is_wide ? 2 * COLUMNS : COLUMNS;
  }
}

void attend(const isvit_swin_block &block, const Head &head,
            int32_t *correction) {
  const int width = block.channels / block.heads;
  pack_keys(block, head, width, correction);
  find_logits(block, head, width, correction);
  if (block.attention.depth == 4)
    quantize_rows<SmallSteps>(block, head);
  else
    quantize_rows<LargeSteps>(block, head);
  mix_all(block, head, width);
}

}  // namespace

#endif
