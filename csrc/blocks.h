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

// A transformer block of Swin or ViT. All products have one segment.
struct isvit_block {
  int32_t channels, heads, hidden;
  isvit_norm norm1, norm2;
  isvit_quantizer qkv_input, query_codes, key_codes, value_codes, proj_input,
      fc1_input, fc2_input;
  isvit_product query, key, value, proj, fc1, fc2;
  const uint8_t *padding;          // [channels] codes of a padding token
  // Key codes less key_center are the weights of a product with the queries, of
  // 1 or 2 bytes each.
  int32_t key_center, key_bytes;
  const isvit_run *key_runs;
  int32_t num_key_runs;
  float logit_scale, value_scale;
  isvit_steps attention;           // decoded value of a probability
};

// The windows of maps of equal size; with global attention each map is one.
// Tokens attend to those of the same window and region.
struct isvit_windows {
  int32_t images, tokens, windows, positions;
  // [windows][positions]: index of the token, or `tokens` for padding.
  const int32_t *token;
  // [windows][positions up to a multiple of 16], or null: one region.
  const int32_t *region;
  // Bias [h * bias_head + i * bias_query + j] is added to the logit of query i
  // and key j in head h. j goes up to a multiple of 16, with -1e30 beyond the
  // positions. Not read if there are relative_rows.
  const float *position_bias;
  int64_t bias_head, bias_query;
  // Decomposed relative positions in windows of height x width, or null: tables
  // [width of a head][2 * length + 16, rounded up to a multiple of 16], length
  // being height or width. Column length - 1 + d has the embedding of a key d
  // rows (or columns) after the query.
  const float *relative_rows, *relative_columns;
  int32_t height, width;
};

// Where tests want the codes within a block written to; each may be null. Rows
// of proj to fc2 that belong to padding tokens are not written.
struct isvit_trace {
  // [windows of all images][positions][channels], and 16 bytes that are read.
  uint8_t *qkv_input, *query, *key, *value, *proj_input, *fc1_input;
  uint8_t *fc2_input;  // the same, of hidden channels up to a multiple of 16
  // [windows][heads][positions][positions up to a multiple of 16], decoded.
  float *attention;
};

// Patch merging: the `parts` tokens of a patch are concatenated, normalized,
// quantized and multiplied.
struct isvit_merging {
  isvit_norm norm;
  isvit_quantizer input;
  isvit_product reduction;
};
struct isvit_merged {
  int32_t images, tokens, rows, parts;
  const int32_t *token;    // [rows][parts]: index, or `tokens` for padding
};

// Run a block on maps x of (images, tokens, channels); y may be x.
ISVIT_API void ISVIT_NAME(run_block)(
    int32_t threads, const isvit_block &block, const isvit_windows &windows,
    const float *x, float *y, const isvit_trace &trace);

// Merge maps x of (images, tokens, channels) into y of (images, rows, outputs).
ISVIT_API void ISVIT_NAME(run_merging)(
    int32_t threads, const isvit_merging &merging, const isvit_merged &merged,
    const float *x, float *y);
