// RoIAlign (Mask R-CNN, arXiv 1703.06870), each box on its level of a feature
// pyramid, whose maps have channels last.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime.h"
#include "simd.h"
#include "threads.h"

namespace {

// One coordinate of a sampling point: the two lines (or columns) of the map
// around it, and the weight of each in bilinear interpolation.
struct Sample { int64_t line[2]; float weight[2]; };

// The sampling points along one side of a box, `count` in each of its bins.
std::vector<Sample> find_samples(float start, float size, int bins, int count,
                                 int lines) {
  std::vector<Sample> samples((size_t)bins * count);
  const float bin = size / bins;
  for (int i = 0; i < bins * count; i++) {
    float at = start + i / count * bin + (i % count + .5f) * bin / count;
    // As in mmcv, points up to one step outside of the map are moved to its
    // border, and those farther away count as zero.
    const bool is_near = at >= -1 && at <= lines;
    at = is_near ? std::min(std::max(at, 0.f), lines - 1.f) : 0.f;
    const int line = (int)at, next = std::min(line + 1, lines - 1);
    const float rest = at - line, whole = 1 - rest;
    samples[i] = {{line, next},
                  {is_near ? whole : 0.f, is_near ? rest : 0.f}};
  }
  return samples;
}

void pool_box(const isvit_pooling &p, int64_t box) {
  const isvit_level &level = p.levels[p.level[box]];
  const float *side = p.boxes + 5 * box;
  const float shift = p.is_aligned ? .5f : 0.f, least = p.is_aligned ? 0 : 1;
  const float left = side[1] * level.scale - shift;
  const float top = side[2] * level.scale - shift;
  const float width = std::max(side[3] * level.scale - shift - left, least);
  const float height = std::max(side[4] * level.scale - shift - top, least);
  const bool is_fixed = p.samples > 0;
  const int across = is_fixed ? p.samples : (int)std::ceil(width / p.width);
  const int down = is_fixed ? p.samples : (int)std::ceil(height / p.height);
  const auto xs = find_samples(left, width, p.width, across, level.width);
  const auto ys = find_samples(top, height, p.height, down, level.height);
  const float count = (float)std::max(across * down, 1);
  const int64_t pixel = p.channels, line = pixel * level.width;
  const float *map = level.values + (int64_t)side[0] * line * level.height;
  float *out = p.values + box * p.channels * p.height * p.width;
  for (int bin = 0; bin < p.height * p.width; bin++, out += p.channels) {
    const Sample *y = ys.data() + bin / p.width * down, *y_end = y + down;
    const Sample *first = xs.data() + bin % p.width * across;
    for (int c = 0; c < p.channels; c += COLUMNS) {
      Floats16 sum = {};
      for (const Sample *j = y; j < y_end; j++)
        for (const Sample *i = first; i < first + across; i++) {
          const float *corner[4];
          float weight[4];
          for (int k = 0; k < 4; k++) {
            corner[k] = map + j->line[k / 2] * line + i->line[k % 2] * pixel;
            weight[k] = j->weight[k / 2] * i->weight[k % 2];
          }
          sum = sum + (load16<Floats>(corner[0] + c) * weight[0] +
                       load16<Floats>(corner[1] + c) * weight[1] +
                       load16<Floats>(corner[2] + c) * weight[2] +
                       load16<Floats>(corner[3] + c) * weight[3]);
        }
      store16(out + c, map16([&](Floats v) ISVIT_INLINE {
        return v / count;
      }, sum));
    }
  }
}

}  // namespace

void ISVIT_NAME(pool)(int32_t threads, const isvit_pooling &pooling) {
  parallel(threads, pooling.num_boxes,
           [&](int64_t box) { pool_box(pooling, box); });
}
