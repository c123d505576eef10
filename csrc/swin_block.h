// A Swin block as one loop over windows. Shift, window and padding are only
// addresses: of the tokens that a window reads and writes, and of the row of
// codes that stands for padding. A window's tokens are its own, so a map may
// be replaced in place.
#ifndef ISVIT_SWIN_BLOCK_H
#define ISVIT_SWIN_BLOCK_H

#include <memory>
#include <vector>

#include "attention.h"
#include "kernels.h"

namespace {

// Memory of one window after another; every thread keeps its own.
class Scratch {
 public:
  Scratch() : next_(0) {}

  template <class T>
  T *take(int64_t count) {
    const int64_t bytes = (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    const int64_t at = next_;
    next_ += bytes;
    return base_ == nullptr ? nullptr : (T *)(base_ + at);
  }
  // Run `layout`, which takes, once to measure and once to get memory.
  template <class F>
  void lay_out(F &&layout) {
    base_ = nullptr;
    next_ = 0;
    layout();
    if ((int64_t)memory_.size() < next_ + 64) memory_.resize(next_ + 64);
    base_ = memory_.data() + (-(uintptr_t)memory_.data() & 63);
    next_ = 0;
    layout();
  }

 private:
  std::vector<uint8_t> memory_;
  uint8_t *base_ = nullptr;
  int64_t next_;
};

thread_local Scratch scratch;

struct WindowMemory {
  uint8_t *input, *query, *key, *value, *mixed, *hidden;
  float *middle;
  int8_t *packed_keys;
  int32_t *correction;
  float *probabilities, *values;
  const uint8_t **rows;
  int32_t *inside;

  explicit WindowMemory(const isvit_swin_block &block) {
    const int64_t count = block.positions, channels = block.channels;
    const int64_t columns = up_to_columns(block.positions);
    const int width = block.channels / block.heads;
    scratch.lay_out([&] {
      input = scratch.take<uint8_t>(count * channels);
      query = scratch.take<uint8_t>(count * channels);
      key = scratch.take<uint8_t>(count * channels);
      value = scratch.take<uint8_t>(count * channels);
      mixed = scratch.take<uint8_t>(count * channels);
      hidden = scratch.take<uint8_t>(count * up_to_columns(block.hidden));
      middle = scratch.take<float>(count * channels);
      packed_keys = scratch.take<int8_t>(columns * width * block.key_parts);
      correction = scratch.take<int32_t>(columns);
      probabilities = scratch.take<float>(count * columns);
      values = scratch.take<float>(count * up_to_columns(width));
      rows = scratch.take<const uint8_t *>(count);
      inside = scratch.take<int32_t>(count);
    });
  }
};

// Call use(r, block, reals) for the outputs of all rows of a product.
template <class Use>
inline ISVIT_INLINE void multiply_rows(const isvit_product &product,
                                       const uint8_t *const *rows,
                                       int num_rows, Use &&use) {
  const int64_t segment = 0;
  for (int block = 0; block < product.blocks; block++) {
    const Affine affine(product, block);
    for (int first = 0; first < num_rows; first += PANEL)
      multiply_block(rows + first, std::min(PANEL, num_rows - first), &segment,
                     product, block,
                     [&](int r, const Ints16 &sums) ISVIT_INLINE {
                       use(first + r, block, affine(sums));
                     });
  }
}

struct SwinWork {
  const isvit_swin_block &block;
  const isvit_windows &windows;
  const float *x;
  float *y;
  const isvit_swin_trace &trace;
};

template <class T>
void copy_rows(T *to, int64_t first, const T *from, int64_t pitch,
               int64_t rows, int64_t width) {
  if (to == nullptr) return;
  for (int64_t i = 0; i < rows; i++)
    std::copy(from + i * pitch, from + i * pitch + width,
              to + (first + i) * width);
}

// One window of one image.
class Window {
 public:
  Window(const SwinWork &work, int64_t task)
      : block_(work.block), trace_(work.trace), memory_(work.block),
        task_(task) {
    const isvit_windows &windows = work.windows;
    const int64_t image = task / windows.windows, w = task % windows.windows;
    first_token_ = image * windows.tokens;
    x_ = work.x + first_token_ * block_.channels;
    y_ = work.y + first_token_ * block_.channels;
    token_ = windows.token + w * block_.positions;
    outside_ = windows.tokens;
    region_ = nullptr;
    if (windows.region != nullptr) {
      const int32_t *region =
          windows.region + w * up_to_columns(block_.positions);
      if (std::any_of(region, region + block_.positions,
                      [&](int32_t r) { return r != region[0]; }))
        region_ = region;
    }
    for (int i = 0; i < block_.positions; i++)
      if (token_[i] != outside_) memory_.inside[num_inside_++] = i;
  }

  void run() {
    make_codes();
    attend_all();
    project();
    feed_forward();
  }

 private:
  void make_codes() {
    const int channels = block_.channels;
    const Encoder<false> encode(block_.qkv_input);
    for (int i = 0; i < block_.positions; i++) {
      uint8_t *codes = memory_.input + (int64_t)i * channels;
      memory_.rows[i] = codes;
      if (token_[i] == outside_)
        memory_.rows[i] = block_.padding;
      else
        norm_codes(block_.norm1, encode, x_ + (int64_t)token_[i] * channels,
                   codes);
    }
    trace_tokens(trace_.qkv_input, memory_.input, channels, channels, true);
    make_operand(block_.query, block_.query_codes, memory_.query);
    make_operand(block_.key, block_.key_codes, memory_.key);
    make_operand(block_.value, block_.value_codes, memory_.value);
    const int64_t first = task_ * block_.positions;
    const int count = block_.positions;
    copy_rows(trace_.query, first, memory_.query, channels, count, channels);
    copy_rows(trace_.key, first, memory_.key, channels, count, channels);
    copy_rows(trace_.value, first, memory_.value, channels, count, channels);
  }

  void make_operand(const isvit_product &product,
                    const isvit_quantizer &quantizer, uint8_t *codes) {
    const Encoder<false> encode(quantizer);
    multiply_rows(product, memory_.rows, block_.positions,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    encode(y, codes + (int64_t)r * block_.channels +
                                  n * COLUMNS);
                  });
  }

  void attend_all() {
    const int width = block_.channels / block_.heads;
    const int count = block_.positions, columns = up_to_columns(count);
    for (int h = 0; h < block_.heads; h++) {
      const int at = h * width;
      const Head head{memory_.query + at, memory_.key + at,
                      memory_.value + at, block_.channels,
                      block_.position_bias + (int64_t)h * count * columns,
                      region_, memory_.mixed + at, memory_.packed_keys,
                      memory_.probabilities, memory_.values};
      attend(block_, head, memory_.correction);
      copy_rows(trace_.attention, (task_ * block_.heads + h) * count,
                memory_.probabilities, columns, count, count);
    }
  }

  // From here on only the tokens inside of the map matter.
  void project() {
    const int channels = block_.channels;
    for (int r = 0; r < num_inside_; r++)
      memory_.rows[r] = memory_.mixed + (int64_t)memory_.inside[r] * channels;
    trace_tokens(trace_.proj_input, memory_.mixed, channels, channels, true);
    multiply_rows(block_.proj, memory_.rows, num_inside_,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    add(x_ + offset(r) + n * COLUMNS, y,
                        memory_.middle + r * channels + n * COLUMNS);
                  });
  }

  void feed_forward() {
    const int channels = block_.channels;
    const Encoder<false> encode(block_.fc1_input);
    for (int r = 0; r < num_inside_; r++) {
      uint8_t *codes = memory_.input + (int64_t)r * channels;
      memory_.rows[r] = codes;
      norm_codes(block_.norm2, encode, memory_.middle + r * channels, codes);
    }
    trace_tokens(trace_.fc1_input, memory_.input, channels, channels, false);
    if (block_.fc2_input.steps.limits != nullptr)
      activate<GeluSteps>();
    else
      activate<GeluEncoder>();
    const int pitch = up_to_columns(block_.hidden);
    trace_tokens(trace_.fc2_input, memory_.hidden, pitch, block_.hidden,
                 false);
    for (int r = 0; r < num_inside_; r++)
      memory_.rows[r] = memory_.hidden + (int64_t)r * pitch;
    multiply_rows(block_.fc2, memory_.rows, num_inside_,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    add(memory_.middle + r * channels + n * COLUMNS, y,
                        y_ + offset(r) + n * COLUMNS);
                  });
  }

  template <class Gelu>
  void activate() {
    const Gelu encode(block_.fc2_input);
    const int pitch = up_to_columns(block_.hidden);
    multiply_rows(block_.fc1, memory_.rows, num_inside_,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    encode(y, memory_.hidden + (int64_t)r * pitch +
                                  n * COLUMNS);
                  });
  }

  static void add(const float *x, const Floats16 &y, float *to) {
    Floats16 sum = load16<Floats16>(x);
    repeat<PARTS>([&](auto j) ISVIT_INLINE { sum.part[j] += y.part[j]; });
    store16(to, sum);
  }

  // Where the r-th token inside of the map begins.
  int64_t offset(int r) const {
    return (int64_t)token_[memory_.inside[r]] * block_.channels;
  }

  // Copy the codes of tokens, which lie by position or one after another.
  void trace_tokens(uint8_t *to, const uint8_t *codes, int pitch, int width,
                    bool by_position) const {
    for (int r = 0; to != nullptr && r < num_inside_; r++) {
      const int i = memory_.inside[r];
      copy_rows(to, first_token_ + token_[i],
                codes + (int64_t)(by_position ? i : r) * pitch, pitch, 1,
                width);
    }
  }

  const isvit_swin_block &block_;
  const isvit_swin_trace &trace_;
  WindowMemory memory_;
  int64_t task_, first_token_;
  const float *x_;
  float *y_;
  const int32_t *token_, *region_;
  int32_t outside_;
  int num_inside_ = 0;
};

void run_window(const void *what, int64_t task) {
  Window(*(const SwinWork *)what, task).run();
}

void run_swin_block(int32_t threads, const isvit_swin_block &block,
                    const isvit_windows &windows, const float *x, float *y,
                    const isvit_swin_trace &trace) {
  const SwinWork work{block, windows, x, y, trace};
  const int64_t tasks = (int64_t)windows.images * windows.windows;
  run_tasks(threads, {run_window, &work, tasks});
}

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
    codes = scratch.take<uint8_t>((int64_t)PANEL * total);
    line = scratch.take<float>(total);
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
