// A transformer block as one loop over windows. Shift, window and padding are
// only addresses: of the tokens that a window reads and writes, and of the row
// of codes that stands for padding. A window's tokens are its own, so a map may
// be replaced in place. A map without windows is one window. A thread runs
// whole windows; where these are few and large, all threads share one.
#ifndef ISVIT_BLOCK_H
#define ISVIT_BLOCK_H

#include "attention.h"
#include "kernels.h"
#include "scratch.h"

namespace {

// Rows that are taken at once outside of the attention, about.
constexpr int CHUNK = 96;
// Logits that are kept at once.
constexpr int64_t LOGITS = 32768;

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

struct BlockWork {
  const isvit_block &block;
  const isvit_windows &windows;
  const float *x;
  float *y;
  const isvit_trace &trace;
};

// What all phases of a window read or write.
struct WindowMemory {
  uint8_t *query, *key, *value, *mixed;
  float *reals;  // of the queries, for relative positions
  int8_t *packed_keys;
  int32_t *correction;
  float *values;
};

// What a phase needs for the rows that it takes at once.
struct RowMemory {
  uint8_t *input, *hidden;
  float *middle, *logits, *bias, *line;
  const uint8_t **rows;
  int32_t *inside;
};

template <class T>
void copy_rows(T *to, int64_t first, const T *from, int64_t pitch,
               int64_t rows, int64_t width) {
  if (to == nullptr) return;
  for (int64_t i = 0; i < rows; i++)
    std::copy(from + i * pitch, from + i * pitch + width,
              to + (first + i) * width);
}

// Sizes, and the arrays that follow from them.
struct Shape {
  int positions, columns, width, chunk, queries;
  bool is_relative;

  explicit Shape(const BlockWork &work) {
    positions = work.windows.positions;
    columns = up_to_columns(positions);
    width = work.block.channels / work.block.heads;
    // Equal chunks of whole tiles.
    const int chunks = (positions + CHUNK - 1) / CHUNK;
    chunk = up_to_tiles((positions + chunks - 1) / chunks);
    queries = up_to_tiles((int)std::min<int64_t>(positions, LOGITS / columns));
    is_relative = work.windows.relative_rows != nullptr;
  }
  int num_chunks() const { return (positions + chunk - 1) / chunk; }
  int num_groups() const { return (positions + queries - 1) / queries; }
  static int up_to_tiles(int count) {
    return std::max(1, (count + TILE_ROWS - 1) / TILE_ROWS) * TILE_ROWS;
  }

  // `heads` is 1 where one head after another uses the same memory.
  void take(const isvit_block &block, int heads, WindowMemory &memory,
            Scratch &from) const {
    const int64_t codes = (int64_t)positions * block.channels;
    from.take(memory.query, codes);
    from.take(memory.key, codes);
    from.take(memory.value, codes);
    from.take(memory.mixed, codes);
    from.take(memory.reals, is_relative ? codes : 0);
    from.take(memory.packed_keys,
              (int64_t)heads * columns * width * block.key_parts);
    from.take(memory.correction, (int64_t)heads * columns);
    from.take(memory.values,
              (int64_t)heads * positions * up_to_columns(width));
  }
  void take(const isvit_block &block, const isvit_windows &windows,
            RowMemory &memory, Scratch &from) const {
    from.take(memory.input, (int64_t)chunk * block.channels);
    from.take(memory.hidden, (int64_t)chunk * up_to_columns(block.hidden));
    from.take(memory.middle, (int64_t)chunk * block.channels);
    from.take(memory.rows, chunk);
    from.take(memory.inside, chunk);
    from.take(memory.logits, (int64_t)queries * columns);
    from.take(memory.bias,
              is_relative ? (int64_t)queries * columns + COLUMNS : 0);
    from.take(memory.line, is_relative ? up_to_columns(windows.height) +
                                             up_to_columns(windows.width)
                                       : 0);
  }
};

// One window of one image. Its phases, in their order, may each be split among
// threads: by chunks of rows, by heads, and by heads and groups of queries.
class Window {
 public:
  Window(const BlockWork &work, const Shape &shape, int64_t number,
         const WindowMemory &window, const RowMemory &rows)
      : work_(work), block_(work.block), shape_(shape), window_(window),
        rows_(rows), number_(number) {
    const isvit_windows &windows = work.windows;
    const int64_t w = number % windows.windows;
    first_token_ = number / windows.windows * windows.tokens;
    token_ = windows.token + w * shape.positions;
    region_ = nullptr;
    if (windows.region == nullptr) return;
    const int32_t *region = windows.region + w * shape.columns;
    if (std::any_of(region, region + shape.positions,
                    [&](int32_t r) { return r != region[0]; }))
      region_ = region;
  }

  void make_codes(int chunk) {
    const int first = chunk * shape_.chunk, channels = block_.channels;
    const int count = std::min(shape_.chunk, shape_.positions - first);
    const Encoder<false> encode(block_.qkv_input);
    for (int i = 0; i < count; i++) {
      uint8_t *codes = rows_.input + (int64_t)i * channels;
      rows_.rows[i] = codes;
      if (is_outside(first + i))
        rows_.rows[i] = block_.padding;
      else
        norm_codes(block_.norm1, encode, work_.x + offset(first + i), codes);
    }
    find_inside(first, count);
    trace_tokens(work_.trace.qkv_input, rows_.input, channels, channels, first,
                 false);
    const isvit_trace &trace = work_.trace;
    make_operand(block_.query, block_.query_codes, first, count, window_.query,
                 trace.query, shape_.is_relative ? window_.reals : nullptr);
    make_operand(block_.key, block_.key_codes, first, count, window_.key,
                 trace.key);
    make_operand(block_.value, block_.value_codes, first, count, window_.value,
                 trace.value);
  }

  // Prepare the keys and values of a head, in the memory of head `place`.
  void prepare(int h, int place) {
    const Head head = head_of(h, place);
    pack_keys(block_, head, shape_.positions, shape_.width);
    decode_values(block_, head, shape_.positions, shape_.width);
  }

  void attend_group(int h, int place, int group) {
    const isvit_windows &windows = work_.windows;
    const int first = group * shape_.queries, columns = shape_.columns;
    Scores scores{first, std::min(shape_.queries, shape_.positions - first),
                  shape_.positions, columns, rows_.logits,
                  windows.position_bias + h * windows.bias_head +
                      first * windows.bias_query,
                  windows.bias_query};
    if (shape_.is_relative) {
      for (int i = 0; i < scores.count; i++)
        find_relative_bias(windows,
                           window_.reals + h * shape_.width +
                               (int64_t)(first + i) * block_.channels,
                           shape_.width, first + i, rows_.line,
                           rows_.bias + (int64_t)i * columns);
      scores.bias = rows_.bias;
      scores.bias_pitch = columns;
    }
    attend(block_, head_of(h, place), scores, region_, shape_.width);
    copy_rows(work_.trace.attention,
              (number_ * block_.heads + h) * shape_.positions + first,
              rows_.logits, columns, scores.count, shape_.positions);
  }

  // From here on only the tokens inside of the map matter.
  void finish(int chunk) {
    const int first = chunk * shape_.chunk, channels = block_.channels;
    find_inside(first, std::min(shape_.chunk, shape_.positions - first));
    for (int r = 0; r < num_inside_; r++)
      rows_.rows[r] = window_.mixed + (int64_t)rows_.inside[r] * channels;
    trace_tokens(work_.trace.proj_input, window_.mixed, channels, channels, 0,
                 false);
    multiply_rows(block_.proj, rows_.rows, num_inside_,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    add(work_.x + offset(rows_.inside[r]) + n * COLUMNS, y,
                        rows_.middle + r * channels + n * COLUMNS);
                  });
    const Encoder<false> encode(block_.fc1_input);
    for (int r = 0; r < num_inside_; r++) {
      uint8_t *codes = rows_.input + (int64_t)r * channels;
      rows_.rows[r] = codes;
      norm_codes(block_.norm2, encode, rows_.middle + r * channels, codes);
    }
    trace_tokens(work_.trace.fc1_input, rows_.input, channels, channels, 0,
                 true);
    if (block_.fc2_input.steps.limits != nullptr)
      activate<GeluSteps>();
    else
      activate<GeluEncoder>();
    const int pitch = up_to_columns(block_.hidden);
    trace_tokens(work_.trace.fc2_input, rows_.hidden, pitch, block_.hidden, 0,
                 true);
    for (int r = 0; r < num_inside_; r++)
      rows_.rows[r] = rows_.hidden + (int64_t)r * pitch;
    multiply_rows(block_.fc2, rows_.rows, num_inside_,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    add(rows_.middle + r * channels + n * COLUMNS, y,
                        work_.y + offset(rows_.inside[r]) + n * COLUMNS);
                  });
  }

 private:
  void make_operand(const isvit_product &product,
                    const isvit_quantizer &quantizer, int first, int count,
                    uint8_t *codes, uint8_t *traced, float *reals = nullptr) {
    const Encoder<false> encode(quantizer);
    const int channels = block_.channels;
    multiply_rows(product, rows_.rows, count,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    const int64_t at =
                        (int64_t)(first + r) * channels + n * COLUMNS;
                    encode(y, codes + at);
                    if (reals != nullptr) store16(reals + at, y);
                  });
    copy_rows(traced, number_ * shape_.positions + first,
              codes + (int64_t)first * channels, channels, count, channels);
  }

  template <class Gelu>
  void activate() {
    const Gelu encode(block_.fc2_input);
    const int pitch = up_to_columns(block_.hidden);
    multiply_rows(block_.fc1, rows_.rows, num_inside_,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    encode(y, rows_.hidden + (int64_t)r * pitch + n * COLUMNS);
                  });
  }

  static void add(const float *x, const Floats16 &y, float *to) {
    Floats16 sum = load16<Floats16>(x);
    repeat<PARTS>([&](auto j) ISVIT_INLINE { sum.part[j] += y.part[j]; });
    store16(to, sum);
  }

  Head head_of(int h, int place) const {
    const int at = h * shape_.width, columns = shape_.columns;
    return {window_.query + at,
            window_.key + at,
            window_.value + at,
            window_.mixed + at,
            window_.packed_keys + (int64_t)place * columns * shape_.width *
                                      block_.key_parts,
            window_.correction + (int64_t)place * columns,
            window_.values + (int64_t)place * shape_.positions *
                                 up_to_columns(shape_.width)};
  }

  bool is_outside(int position) const {
    return token_[position] == work_.windows.tokens;
  }
  // Where the token of a position begins.
  int64_t offset(int position) const {
    return (first_token_ + token_[position]) * block_.channels;
  }
  void find_inside(int first, int count) {
    num_inside_ = 0;
    for (int i = first; i < first + count; i++)
      if (!is_outside(i)) rows_.inside[num_inside_++] = i;
  }

  // Copy the codes of the tokens inside, whose rows lie one after another, or
  // by position from `first` on.
  void trace_tokens(uint8_t *to, const uint8_t *codes, int pitch, int width,
                    int first, bool is_dense) const {
    for (int r = 0; to != nullptr && r < num_inside_; r++) {
      const int i = rows_.inside[r];
      copy_rows(to, first_token_ + token_[i],
                codes + (int64_t)(is_dense ? r : i - first) * pitch, pitch, 1,
                width);
    }
  }

  const BlockWork &work_;
  const isvit_block &block_;
  const Shape &shape_;
  WindowMemory window_;
  RowMemory rows_;
  int64_t number_, first_token_;
  const int32_t *token_, *region_;
  int num_inside_ = 0;
};

// A whole window in a thread's own memory.
void run_window(const BlockWork &work, const Shape &shape, int64_t number) {
  WindowMemory memory;
  RowMemory rows;
  scratch.lay_out([&] {
    shape.take(work.block, 1, memory, scratch);
    shape.take(work.block, work.windows, rows, scratch);
  });
  Window window(work, shape, number, memory, rows);
  for (int i = 0; i < shape.num_chunks(); i++) window.make_codes(i);
  for (int h = 0; h < work.block.heads; h++) {
    window.prepare(h, 0);
    for (int i = 0; i < shape.num_groups(); i++) window.attend_group(h, 0, i);
  }
  for (int i = 0; i < shape.num_chunks(); i++) window.finish(i);
}

// A window that all threads share, phase after phase.
void run_shared_window(int threads, const BlockWork &work, const Shape &shape,
                       int64_t number, const WindowMemory &memory) {
  const auto own = [&] {
    RowMemory rows;
    scratch.lay_out(
        [&] { shape.take(work.block, work.windows, rows, scratch); });
    return Window(work, shape, number, memory, rows);
  };
  const int heads = work.block.heads, groups = shape.num_groups();
  parallel(threads, shape.num_chunks(),
           [&](int64_t i) { own().make_codes((int)i); });
  parallel(threads, heads, [&](int64_t h) { own().prepare((int)h, (int)h); });
  parallel(threads, (int64_t)heads * groups, [&](int64_t task) {
    const int h = (int)(task / groups);
    own().attend_group(h, h, (int)(task % groups));
  });
  parallel(threads, shape.num_chunks(),
           [&](int64_t i) { own().finish((int)i); });
}

}  // namespace

void ISVIT_NAME(run_block)(int32_t threads, const isvit_block &block,
               const isvit_windows &windows, const float *x, float *y,
               const isvit_trace &trace) {
  const BlockWork work{block, windows, x, y, trace};
  const int64_t count = (int64_t)windows.images * windows.windows;
  const Shape shape(work);
  if (threads == 1 || count >= 2 * threads || shape.num_chunks() == 1)
    return parallel(threads, count,
                    [&](int64_t number) { run_window(work, shape, number); });
  Scratch shared;
  WindowMemory memory;
  shared.lay_out([&] { shape.take(block, block.heads, memory, shared); });
  for (int64_t number = 0; number < count; number++)
    run_shared_window(threads, work, shape, number, memory);
}

#endif
