// The C interface of the integer runtime; isvit_det/runtime/native.py mirrors
// its structures. Sizes are in elements unless a name says bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#define ISVIT_API extern "C" __attribute__((visibility("default")))
// The functions of a set of kernels end in its name: isvit_encode_avx2.
#define ISVIT_JOIN(name, set) isvit_##name##_##set
#define ISVIT_EXPAND(name, set) ISVIT_JOIN(name, set)
#define ISVIT_NAME(name) ISVIT_EXPAND(name, ISVIT_KERNELS)

// Raised whenever a structure or a function below changes.
constexpr int32_t ISVIT_VERSION = 8;

// A stretch of the inputs that int16 lanes may sum before they are widened:
// `groups` groups of four inputs, from `offset` bytes behind the start of each
// of the segments `segment` .. `segment + segments - 1` of a row.
struct isvit_run {
  int32_t segment, segments, offset, groups;
  // Bits that all sums so far move left once this run is added: 0, or 4
  // behind the upper halves of weights that do not fit eight bits.
  int32_t shift;
};

// A layer: y[n] = (sum_k a[k] * w[n][k] + correction[n]) * scale[n] + bias[n].
// Arrays have `blocks * 16` entries; those beyond `outputs` are zero.
struct isvit_product {
  const int8_t *weight;        // [blocks][groups][16][4], in the order of runs
  const int32_t *correction;   // -zero point of the input * sum_k w[n][k]
  const float *scale;          // scale of the input * scale of the weights
  const float *bias;
  const isvit_run *runs;
  int32_t num_runs, groups, blocks, outputs;
};

// code = clamp(round(x / scale) + zero_point, 0, top); with `entries`, what is
// stored is entries[code].
struct isvit_quantizer {
  float scale;
  int32_t zero_point, top;
  const uint8_t *entries;      // [top + 1], or null
};

// A map of codes, channels last, with its border; `channels` is padded to a
// multiple of four with zeros.
struct isvit_map {
  int32_t images, height, width, channels;
  int32_t padding_top, padding_left, padding_bottom, padding_right;
  uint8_t padding_code;
};

// Where the rows of a product lie. Row r is position (i, y, x) of a grid
// images x height x width, x running fastest; its inputs start at
// codes + i * image_stride + y * line_stride + x * pixel_stride, and segment s
// of them `segments[s]` bytes behind that. Strides are in bytes.
struct isvit_rows {
  const uint8_t *codes;
  int32_t images, height, width;
  int64_t image_stride, line_stride, pixel_stride;
  const int64_t *segments;
};

// Where the outputs go: output n of position (i, p = y * width + x) to
// i * image_stride + p * pixel_stride + n * channel_stride.
struct isvit_output {
  float *values;
  int64_t image_stride, pixel_stride, channel_stride;
};

// A level of a feature pyramid: maps of (images, height, width, channels), of
// which one step is 1 / scale pixels of the image.
struct isvit_level {
  const float *values;
  int32_t height, width;
  float scale;
};

// RoIAlign of boxes, each on its level: a bin is the mean of samples on a grid
// within it.
struct isvit_pooling {
  const isvit_level *levels;
  // [num_boxes][5]: image, left, top, right, bottom.
  const float *boxes;
  const int64_t *level;        // [num_boxes]
  int32_t num_boxes, channels; // channels a multiple of 16
  int32_t height, width;       // bins of a box
  int32_t samples;             // along a side of a bin; 0: one for each step
  int32_t is_aligned;          // whether pixels' centres lie at halves
  float *values;               // [num_boxes][height][width][channels]
};

ISVIT_API int32_t isvit_version();

// Sets of kernels that this library has and this CPU runs, as bits of
// `1 << isvit_isa`.
enum isvit_isa : int32_t { ISVIT_PORTABLE, ISVIT_AVX2, ISVIT_AVXVNNI,
                           ISVIT_AVX512VNNI, ISVIT_NUM_ISAS };
ISVIT_API int32_t isvit_supported();

// Quantize a float map, whose strides are those of (image, channel, line,
// pixel), into a map of codes.
ISVIT_API void ISVIT_NAME(encode)(int32_t threads,
                                  const isvit_quantizer &quantizer,
                                  const float *x, const int64_t *strides,
                                  int32_t channels, const isvit_map &map,
                                  uint8_t *codes);

// Multiply the rows by a layer. Results do not depend on `threads`.
ISVIT_API void ISVIT_NAME(multiply)(int32_t threads,
                                    const isvit_product &product,
                                    const isvit_rows &rows,
                                    const isvit_output &output);

ISVIT_API void ISVIT_NAME(pool)(int32_t threads, const isvit_pooling &pooling);
