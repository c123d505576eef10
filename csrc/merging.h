// Patch merging: norm, codes and a product of the tokens of each patch.
#ifndef ISVIT_MERGING_H
#define ISVIT_MERGING_H

#include "block.h"

namespace {

struct MergeWork {
  const isvit_merging &merging;
  const isvit_merged &merged;
  const float *x;
  float *y;
  int64_t panels;  // of an image
};

void run_merging_panel(const void *what, int64_t task) {
  const MergeWork &work = *(const MergeWork *)what;
  const isvit_merged &merged = work.merged;
  const isvit_product &product = work.merging.reduction;
  const int total = work.merging.norm.channels;
  const int channels = total / merged.parts;
  const int64_t image = task / work.panels;
  const int64_t begin = task % work.panels * PANEL;
  const int count = (int)std::min<int64_t>(PANEL, merged.rows - begin);
  uint8_t *codes = nullptr;
  float *line = nullptr;
  scratch.lay_out([&] {
    scratch.take(codes, (int64_t)PANEL * total);
    scratch.take(line, total);
  });
  const float *x = work.x + image * merged.tokens * channels;
  const Encoder<false> encode(work.merging.input);
  const uint8_t *rows[PANEL];
  for (int r = 0; r < count; r++) {
    const int32_t *token = merged.token + (begin + r) * merged.parts;
    for (int p = 0; p < merged.parts; p++) {
      float *to = line + p * channels;
      const float *from = x + (int64_t)token[p] * channels;
      if (token[p] == merged.tokens)
        std::fill(to, to + channels, 0.f);
      else
        std::copy(from, from + channels, to);
    }
    norm_codes(work.merging.norm, encode, line, codes + (int64_t)r * total);
    rows[r] = codes + (int64_t)r * total;
  }
  float *y = work.y + (image * merged.rows + begin) * product.outputs;
  multiply_rows(product, rows, count,
                [&](int r, int n, const Floats16 &value) ISVIT_INLINE {
                  store16(y + (int64_t)r * product.outputs + n * COLUMNS, value);
                });
}

void run_merging(int32_t threads, const isvit_merging &merging,
                 const isvit_merged &merged, const float *x, float *y) {
  const int64_t panels = (merged.rows + PANEL - 1) / PANEL;
  const MergeWork work{merging, merged, x, y, panels};
  run_tasks(threads, {run_merging_panel, &work, merged.images * panels});
}

}  // namespace

#endif
