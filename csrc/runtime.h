// The C interface of the integer runtime; isvit_det/runtime/native.py mirrors
// its structures. Sizes are in elements unless a name says bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#define ISVIT_API extern "C" __attribute__((visibility("default")))
// Functions that exist once per instruction set end in its name, as
// isvit_encode_avx2 does.
#define ISVIT_JOIN(name, set) isvit_##name##_##set
#define ISVIT_EXPAND(name, set) ISVIT_JOIN(name, set)
#define ISVIT_NAME(name) ISVIT_EXPAND(name, ISVIT_KERNELS)

// A run: inputs whose products int16 lanes may sum before they are widened. In
// each of the segments `segment` .. `segment + segments - 1` of a row it covers
// `groups` groups of four inputs, beginning `offset` bytes into the segment.
struct isvit_run {
  int32_t segment, segments, offset, groups;
  // Whether its weights have 16 bits, [groups][2][16][2]: those of inputs 0 and
  // 2 of a group, then of 1 and 3. Their products are summed in int32 lanes.
  int32_t is_wide;
};

// A linear layer or convolution:
// y[n] = (sum_k a[k] * w[n][k] + correction[n]) * scale[n] + bias[n].
// Arrays have `blocks * 16` entries, zero beyond `outputs`.
struct isvit_product {
  // [blocks][groups][16][4], in the order of runs; see isvit_run::is_wide.
  const int8_t *weight;
  const int32_t *correction;   // -zero point of the input * sum_k w[n][k]
  const float *scale;          // scale of the input * scale of the weights
  const float *bias;
  const isvit_run *runs;
  int32_t num_runs, block_bytes, blocks, outputs;
};

// A step function with 2^depth steps: its value is values[k] where x is at
// least k of the limits. These are a binary search tree in heap order: the root
// is limits[1], the children of limits[i] are limits[2i] and limits[2i + 1].
struct isvit_steps {
  const float *limits, *values;  // [2^depth]
  int32_t depth;                 // 4 or more, or 0: there are none
};

// code = clamp(round(x / scale) + zero_point, 0, top). If there are steps, what
// is stored is the value of the step that x lies in: an entry of a table, or
// where x is the input of a GELU, what its output is quantized to.
struct isvit_quantizer {
  float scale;
  int32_t zero_point, top;
  isvit_steps steps;
};

// A padded map of codes with channels last. Height and width are those without
// padding; `channels` is a multiple of four, filled up with zeros.
struct isvit_map {
  int32_t images, height, width, channels;
  int32_t padding_top, padding_left, padding_bottom, padding_right;
  uint8_t padding_code;
};

// The rows of codes that are multiplied. Row r is position (i, y, x) of a grid
// images x height x width, x running fastest; its inputs start at
// codes + i * image_stride + y * line_stride + x * pixel_stride, and segment s
// of them `segments[s]` bytes after that. Strides are in bytes.
struct isvit_rows {
  const uint8_t *codes;
  int32_t images, height, width;
  int64_t image_stride, line_stride, pixel_stride;
  const int64_t *segments;
};

// Where outputs are stored: output n of position (i, p = y * width + x) at
// i * image_stride + p * pixel_stride + n * channel_stride.
struct isvit_output {
  float *values;
  int64_t image_stride, pixel_stride, channel_stride;
};

// A level of a feature pyramid: maps of (images, height, width, channels);
// `scale` is their size divided by the image's.
struct isvit_level {
  const float *values;
  int32_t height, width;
  float scale;
};

// RoIAlign with average pooling, of boxes each on its level.
struct isvit_pooling {
  const isvit_level *levels;
  // [num_boxes][5]: image, left, top, right, bottom.
  const float *boxes;
  const int64_t *level;        // [num_boxes]
  int32_t num_boxes, channels; // channels a multiple of 16
  int32_t height, width;       // bins of a box
  // Sampling points along each side of a bin; 0: its size, rounded up.
  int32_t samples;
  int32_t is_aligned;          // boxes are shifted by half a pixel of the map
  float *values;               // [num_boxes][height][width][channels]
};

// Instruction sets for which this library has kernels and that this CPU
// supports, as a sum of `1 << isvit_isa`.
enum isvit_isa : int32_t { ISVIT_PORTABLE, ISVIT_AVX2, ISVIT_AVXVNNI,
                           ISVIT_AVX512VNNI, ISVIT_NUM_ISAS };
ISVIT_API int32_t isvit_supported();

// Quantize maps of floats, which have four strides (image, channel, line,
// pixel). Results do not depend on `threads`, here and below.
ISVIT_API void ISVIT_NAME(encode)(
    int32_t threads, const isvit_quantizer &quantizer, const float *x,
    const int64_t *strides, int32_t channels, const isvit_map &map,
    uint8_t *codes);

// Multiply rows of codes by a layer's weights.
ISVIT_API void ISVIT_NAME(multiply)(
    int32_t threads, const isvit_product &product, const isvit_rows &rows,
    const isvit_output &output);

ISVIT_API void ISVIT_NAME(pool)(int32_t threads, const isvit_pooling &pooling);
