// The C interface of transformer blocks and patch mergings, an extension of
// runtime.h; isvit_det/runtime/blocks.py mirrors its structures.
#pragma once

#include "runtime.h"

// LayerNorm over `channels`, a multiple of 16.
struct isvit_norm {
  const float *weight, *bias;
  float eps;
  int32_t channels;
};

// A step function with 2^depth steps: x lies in step k if it reaches k of the
// limits, and its value is values[k]. The limits are a heap, root limits[1]:
// those below and above limits[i] are found from limits[2i] and limits[2i + 1]
// on. depth is at least 4, so that sixteen entries can always be read.
struct isvit_steps {
  const float *limits, *values;  // [2^depth]
  int32_t depth;
};

// Codes of gelu(y). With `steps` that have limits (depth 4) the code is the
// number of y's step, except below `left`, where gelu falls and the code is
// `left_code`. Without, it is computed.
struct isvit_gelu {
  isvit_quantizer quantizer;
  isvit_steps steps;
  float left;
  int32_t left_code;
};

// A block of Swin or ViT. Rows of all products are one segment.
struct isvit_block {
  int32_t channels, heads, hidden;
  isvit_norm norm1, norm2;
  isvit_quantizer qkv_input, query_codes, key_codes, value_codes, proj_input,
      fc1_input;
  isvit_gelu fc2_input;
  isvit_product query, key, value, proj, fc1, fc2;
  const uint8_t *padding;          // [channels] codes of a padding token
  // Keys are the weights of a product, less key_center and in one part, or in
  // two parts 16 * high + low, in the order of the runs.
  int32_t key_center, key_parts;
  const isvit_run *key_runs;
  int32_t num_key_runs;
  float logit_scale, value_scale;
  isvit_steps attention;           // of a probability
};

// Windows of equal maps, or whole maps as one window each. Tokens of one
// window attend within their region.
struct isvit_windows {
  int32_t images, tokens, windows, positions;
  const int32_t *token;            // [windows][positions], `tokens` for padding
  // [windows][positions up to a multiple of 16], or null: one region.
  const int32_t *region;
  // Added to the logit of query i and key j of head h, at
  // [h * bias_head + i * bias_query + j], j up to a multiple of 16: -1e30
  // beyond the positions. Not read if relative_rows is given.
  const float *position_bias;
  int64_t bias_head, bias_query;
  // Or null: decomposed relative positions of a window of height x width.
  // Column length - 1 + d of a table [width of a head][2 * length + 16 up to a
  // multiple of 16] is the embedding of a key d rows (or columns) after the
  // query.
  const float *relative_rows, *relative_columns;
  int32_t height, width;
};

// Memory that keeps the codes within a block, for tests; each may be null. Rows
// of tokens outside of the map are not written.
struct isvit_trace {             // [windows of all images][positions]...
  uint8_t *qkv_input, *query, *key, *value, *proj_input,
      *fc1_input;                // [channels]
  uint8_t *fc2_input;            // [hidden up to a multiple of 16]
  // [windows][heads][positions][positions up to a multiple of 16], decoded.
  float *attention;
};

// Patch merging: LayerNorm of `parts` tokens side by side, codes, product.
struct isvit_merging {
  isvit_norm norm;
  isvit_quantizer input;
  isvit_product reduction;
};
struct isvit_merged {
  int32_t images, tokens, rows, parts;
  const int32_t *token;            // [rows][parts], `tokens` for zeros
};

// Run a block on maps x of (images, tokens, channels); y may be x.
ISVIT_API void ISVIT_NAME(run_block)(int32_t threads, const isvit_block &block,
                                     const isvit_windows &windows,
                                     const float *x, float *y,
                                     const isvit_trace &trace);

// Merge maps x of (images, tokens, channels) into y of (images, rows, outputs).
ISVIT_API void ISVIT_NAME(run_merging)(int32_t threads,
                                       const isvit_merging &merging,
                                       const isvit_merged &merged,
                                       const float *x, float *y);
