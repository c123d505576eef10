// Patch merging: LayerNorm of the tokens of each patch, codes, linear layer.
#pragma once

#include "block.h"

namespace {

// Merge up to PANEL patches, whose token indices begin at `token`.
void merge_panel(const isvit_merging &merging, const isvit_merged &merged,
                 const float *x, const int32_t *token, int count, float *y) {
  const int total = merging.norm.channels, channels = total / merged.parts;
  uint8_t *codes;
  float *line;
  row_scratch.lay_out([&] {
    row_scratch.take((int64_t)PANEL * total, codes);
    row_scratch.take(total, line);
  });
  const Encoder<false> encode(merging.input);
  const uint8_t *rows[PANEL];
  for (int r = 0; r < count; r++) {
    for (int p = 0; p < merged.parts; p++, token++) {
      const float *from = x + (int64_t)*token * channels;
      if (*token == merged.tokens)
        std::fill_n(line + p * channels, channels, 0.f);
      else
        std::copy(from, from + channels, line + p * channels);
    }
    norm_codes(merging.norm, encode, line, codes + (int64_t)r * total);
    rows[r] = codes + (int64_t)r * total;
  }
  const int64_t pitch = merging.reduction.outputs;
  multiply_rows(merging.reduction, rows, count,
                [&](int r, int n, const Floats16 &sum) ISVIT_INLINE {
                  store16(y + r * pitch + n * COLUMNS, sum);
                });
}

}  // namespace

void ISVIT_NAME(run_merging)(int32_t threads, const isvit_merging &merging,
                             const isvit_merged &merged, const float *x,
                             float *y) {
  const int64_t panels = (merged.rows + PANEL - 1) / PANEL;
  const int channels = merging.norm.channels / merged.parts;
  parallel(threads, merged.images * panels, [&](int64_t task) {
    const int64_t image = task / panels, first = task % panels * PANEL;
    merge_panel(merging, merged, x + image * merged.tokens * channels,
                merged.token + first * merged.parts,
                (int)std::min<int64_t>(PANEL, merged.rows - first),
                y + (image * merged.rows + first) * merging.reduction.outputs);
  });
}
