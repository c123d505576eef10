// The exported functions of one instruction set. This file is compiled once for
// each set, with the compiler flags for it and ISVIT_KERNELS as its name.
#include <algorithm>

#include "encoder.h"
#include "gemm.h"
#include "merging.h"
#include "roi_align.h"
#include "threads.h"

namespace {

// Values of a task: with fewer, waking a thread costs more than it saves.
constexpr int64_t TASK_VALUES = 8192;

struct EncodeWork {
  const float *x;
  const int64_t *strides;  // of image, channel, line and pixel
  int32_t channels;
  const isvit_map &map;
  uint8_t *codes;
  int64_t lines, columns;  // of a padded map
  const float *end;        // of the memory of x
};

// Encode a line whose channels are planes, by squares that are transposed.
void encode_planes(const EncodeWork &work, const Encoder<true> &encode,
                   const float *x, uint8_t *to) {
  const isvit_map &map = work.map;
  alignas(64) uint8_t square[COLUMNS][COLUMNS];
  alignas(64) float tail[COLUMNS] = {};
  for (int c = 0; c < work.channels; c += COLUMNS) {
    const int rows = std::min(COLUMNS, work.channels - c);
    for (int p = 0; p < map.width; p += COLUMNS) {
      const int columns = std::min(COLUMNS, map.width - p);
      for (int i = 0; i < rows; i++) {
        const float *from = x + (c + i) * work.strides[1] + p;
        // A vector that reads beyond its line is harmless, except at the end of
        // the map's memory.
        if (from + COLUMNS > work.end) {
          std::copy(from, from + columns, tail);
          from = tail;
        }
        encode(load16<Floats>(from), square[i]);
      }
      transpose(square);
      uint8_t *pixel = to + (int64_t)p * map.channels + c;
      for (int j = 0; j < columns; j++, pixel += map.channels) {
        if (rows == COLUMNS)
          std::copy(square[j], square[j] + COLUMNS, pixel);
        else
          std::copy(square[j], square[j] + rows, pixel);
      }
    }
  }
}

// Encode a line of any other layout, pixel by pixel.
void encode_pixels(const EncodeWork &work, const Encoder<true> &encode,
                   const float *x, uint8_t *to) {
  alignas(64) float values[COLUMNS] = {};
  uint8_t codes[COLUMNS];
  const int64_t step = work.strides[1];
  for (int p = 0; p < work.map.width; p++, to += work.map.channels) {
    const float *pixel = x + p * work.strides[3];
    for (int c = 0; c < work.channels; c += COLUMNS) {
      const int count = std::min(COLUMNS, work.channels - c);
      if (step == 1 && count == COLUMNS) {
        encode(load16<Floats>(pixel + c), to + c);
        continue;
      }
      for (int i = 0; i < count; i++) values[i] = pixel[(c + i) * step];
      encode(load16<Floats>(values), codes);
      std::copy(codes, codes + count, to + c);
    }
  }
}

// Encode one line of the padded maps; those of all images are numbered on.
void encode_line(const EncodeWork &work, const Encoder<true> &encode,
                 int64_t line) {
  const isvit_map &map = work.map;
  const int64_t image = line / work.lines, width = work.columns;
  const int64_t y = line % work.lines - map.padding_top;
  uint8_t *to = work.codes + line * width * map.channels;
  std::fill_n(to, width * map.channels, map.padding_code);
  if (y < 0 || y >= map.height) return;
  to += (int64_t)map.padding_left * map.channels;
  const float *x = work.x + image * work.strides[0] + y * work.strides[2];
  // The channels that round up to groups of four have weights of zero.
  if (work.channels < map.channels)
    std::fill_n(to, (int64_t)map.width * map.channels, 0);
  if (work.strides[3] == 1 && work.strides[1] != 1)
    encode_planes(work, encode, x, to);
  else
    encode_pixels(work, encode, x, to);
}

}  // namespace

void ISVIT_NAME(encode)(int32_t threads, const isvit_quantizer &quantizer,
                        const float *x, const int64_t *strides,
                        int32_t channels, const isvit_map &map,
                        uint8_t *codes) {
  const int64_t height = map.padding_top + map.height + map.padding_bottom;
  const int64_t width = map.padding_left + map.width + map.padding_right;
  const int64_t lines = map.images * height, values = width * map.channels;
  if (lines * values == 0) return;
  const int64_t each = 1 + TASK_VALUES / values;
  const float *end = x + 1 + strides[0] * (map.images - 1) +
                     strides[1] * (channels - 1) +
                     strides[2] * (map.height - 1) +
                     strides[3] * (map.width - 1);
  const EncodeWork work{x, strides, channels, map, codes, height, width, end};
  parallel(threads, (lines + each - 1) / each, [&](int64_t task) {
    const Encoder<true> encode(quantizer);
    const int64_t last = std::min((task + 1) * each, lines);
    for (int64_t line = task * each; line < last; line++)
      encode_line(work, encode, line);
  });
}

namespace {

// Addresses of the rows of a panel, and offsets of their outputs.
struct Panel {
  const uint8_t *row[PANEL];
  int64_t output[PANEL];
  int num_rows;

  Panel(const isvit_rows &rows, const isvit_output &out, int64_t first,
        int count)
      : num_rows(count) {
    const int64_t pixels = (int64_t)rows.height * rows.width;
    int64_t image = first / pixels, pixel = first % pixels;
    int64_t y = pixel / rows.width, x = pixel % rows.width;
    for (int i = 0; i < num_rows; i++) {
      row[i] = rows.codes + image * rows.image_stride +
               y * rows.line_stride + x * rows.pixel_stride;
      output[i] = image * out.image_stride + pixel * out.pixel_stride;
      pixel++;
      if (++x == rows.width) x = 0, y++;
      if (pixel == pixels) pixel = y = 0, image++;
    }
  }
};

void multiply_panel(const isvit_product &product, const isvit_rows &rows,
                    const isvit_output &out, const Panel &panel, int block) {
  const Affine affine(product, block);
  const int64_t stride = out.channel_stride, *at = panel.output;
  const int count = std::min(COLUMNS, product.outputs - block * COLUMNS);
  float *first = out.values + block * COLUMNS * stride;
  const bool is_direct = count == COLUMNS && stride == 1;
  alignas(64) float values[PANEL][COLUMNS];
  multiply_block(panel.row, panel.num_rows, rows.segments, product, block,
                 [&](int r, const Ints16 &sums) {
                   float *to = is_direct ? first + at[r] : values[r];
                   store16(to, affine(sums));
                   // Where the next block stores.
                   __builtin_prefetch(to + COLUMNS, 1);
                 });
  if (is_direct) return;
  int r = 0;
  if (count == COLUMNS)
    for (; r + 4 <= panel.num_rows && at[r + 3] == at[r] + 3; r += 4)
      for (int n = 0; n < COLUMNS; n += 4)
        transpose(values[r] + n, COLUMNS, first + at[r] + n * stride, stride);
  for (; r < panel.num_rows; r++)
    for (int n = 0; n < count; n++) first[at[r] + n * stride] = values[r][n];
}

}  // namespace

void ISVIT_NAME(multiply)(int32_t threads, const isvit_product &product,
                          const isvit_rows &rows,
                          const isvit_output &output) {
  const int64_t num_rows = (int64_t)rows.images * rows.height * rows.width;
  const int64_t panels = (num_rows + PANEL - 1) / PANEL;
  if (panels == 0) return;
  // With few panels, the blocks of each are shared among threads as well.
  const int64_t parts = std::min<int64_t>(
      product.blocks, panels < 4 * threads ? (4 * threads) / panels : 1);
  const int32_t blocks = (int32_t)((product.blocks + parts - 1) / parts);
  const int64_t groups = (product.blocks + blocks - 1) / blocks;
  parallel(threads, panels * groups, [&](int64_t task) {
    const int64_t begin = task % panels * PANEL;
    const Panel panel(rows, output, begin,
                      (int)std::min<int64_t>(PANEL, num_rows - begin));
    const int first = (int)(task / panels) * blocks;
    const int last = std::min(first + blocks, product.blocks);
    for (int block = first; block < last; block++)
      multiply_panel(product, rows, output, panel, block);
  });
}
