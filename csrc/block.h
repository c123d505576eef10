// A transformer block as one loop over windows. Shift, window and padding move
// no data: a window reads and writes its tokens where they lie in the map, and
// padding tokens point to one shared row of codes. Each token belongs to one
// window, so the output may replace the input. Global attention is a single
// window. A thread runs whole windows; if they are few, threads share each.
#pragma once

#include "attention.h"
#include "scratch.h"
#include "threads.h"

namespace {

// Approximate number of rows processed at once, except by the attention.
constexpr int CHUNK = 96;
// Upper bound of the logits in memory at once, for one thread.
constexpr int64_t LOGITS = 32768;

// Call use(r, block, outputs) with the float outputs of all rows and blocks.
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

// Memory of a window that later phases read.
struct WindowMemory {
  uint8_t *query, *key, *value, *mixed;
  float *reals;  // queries before quantization, for relative positions
  int8_t *packed_keys;
  int32_t *correction;
  float *values;
};

// Memory for the rows that a phase processes at once.
struct RowMemory {
  uint8_t *input, *hidden;
  float *middle, *logits, *bias, *line;
  const uint8_t **rows;
  int32_t *inside;
};

// Sizes of a window and its chunks, and of the arrays for them.
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

  // `heads` is 1 where all heads use the same memory in turn.
  void take(const isvit_block &block, int heads, WindowMemory &memory,
            Scratch &from) const {
    const int64_t codes = (int64_t)positions * block.channels;
    from.take(codes, memory.query, memory.key, memory.value, memory.mixed);
    from.take(is_relative ? codes : 0, memory.reals);
    from.take((int64_t)heads * columns * width * block.key_bytes,
              memory.packed_keys);
    from.take((int64_t)heads * columns, memory.correction);
    from.take((int64_t)heads * positions * up_to_columns(width), memory.values);
  }
  void take(const isvit_block &block, const isvit_windows &windows,
            RowMemory &memory, Scratch &from) const {
    from.take((int64_t)chunk * block.channels, memory.input, memory.middle);
    from.take((int64_t)chunk * up_to_columns(block.hidden), memory.hidden);
    from.take(chunk, memory.rows, memory.inside);
    from.take((int64_t)queries * columns + COLUMNS, memory.logits, memory.bias);
    from.take(up_to_columns(windows.height) + up_to_columns(windows.width),
              memory.line);
  }
};

// One window of one image. Its phases run in the order of the public methods;
// threads may share the chunks of rows of make_codes and finish, the heads of
// prepare, and the heads and groups of queries of attend_group.
class Window {
 public:
  Window(const BlockWork &work, const Shape &shape, int64_t number,
         const WindowMemory &window, const RowMemory &rows)
      : work_(work), block_(work.block), trace_(work.trace), shape_(shape),
        window_(window), rows_(rows), number_(number) {
    const isvit_windows &windows = work.windows;
    const int64_t w = number % windows.windows;
    first_token_ = number / windows.windows * windows.tokens;
    token_ = windows.token + w * shape.positions;
    region_ = nullptr;
    keep(trace_.query, window_.query, 0, block_.channels);
    keep(trace_.key, window_.key, 0, block_.channels);
    keep(trace_.value, window_.value, 0, block_.channels);
    keep(trace_.proj_input, window_.mixed, 0, block_.channels);
    if (windows.region == nullptr) return;
    const int32_t *region = windows.region + w * shape.columns;
    if (std::any_of(region, region + shape.positions,
                    [&](int32_t r) { return r != region[0]; }))
      region_ = region;
  }

  void make_codes(int chunk) {
    const int first = chunk * shape_.chunk, channels = block_.channels;
    const int count = std::min(shape_.chunk, shape_.positions - first);
    keep(trace_.qkv_input, rows_.input, first, channels);
    const Encoder<false> encode(block_.qkv_input);
    for (int i = 0; i < count; i++) {
      uint8_t *codes = rows_.input + (int64_t)i * channels;
      rows_.rows[i] = codes;
      if (is_outside(first + i))
        rows_.rows[i] = block_.padding;
      else
        norm_codes(block_.norm1, encode, work_.x + offset(first + i), codes);
    }
    make_operand(block_.query, block_.query_codes, first, count, window_.query,
                 shape_.is_relative ? window_.reals : nullptr);
    make_operand(block_.key, block_.key_codes, first, count, window_.key);
    make_operand(block_.value, block_.value_codes, first, count, window_.value);
  }

  // Pack the keys and decode the values of head h into slot `place`.
  void prepare(int h, int place) {
    const Head head = head_of(h, place);
    (block_.key_bytes == 1 ? pack_keys<int8_t> : pack_keys<int16_t>)(
        block_, head, shape_.positions, shape_.width);
    decode_values(block_, head, shape_.positions, shape_.width);
  }

  void attend_group(int h, int place, int group) {
    const isvit_windows &windows = work_.windows;
    const int first = group * shape_.queries, columns = shape_.columns;
    if (trace_.attention != nullptr)
      rows_.logits = trace_.attention +
                     ((number_ * block_.heads + h) * shape_.positions + first) *
                         columns;
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
  }

  // Projection and MLP, for the tokens inside the map; padding is dropped.
  void finish(int chunk) {
    const int first = chunk * shape_.chunk, channels = block_.channels;
    const int last = std::min(first + shape_.chunk, shape_.positions);
    const int64_t pitch = up_to_columns(block_.hidden);
    keep(trace_.fc1_input, rows_.input, first, channels);
    keep(trace_.fc2_input, rows_.hidden, first, pitch);
    int count = 0;
    for (int i = first; i < last; i++)
      if (!is_outside(i)) rows_.inside[count++] = i;
    const auto point = [&](const uint8_t *codes, int64_t width, int from) {
      for (int r = 0; r < count; r++)
        rows_.rows[r] = codes + (rows_.inside[r] - from) * width;
    };
    point(window_.mixed, channels, 0);
    multiply_rows(block_.proj, rows_.rows, count,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    const float *x = work_.x + offset(rows_.inside[r]);
                    store16(rows_.middle + r * channels + n * COLUMNS,
                            load16<Floats>(x + n * COLUMNS) + y);
                  });
    const Encoder<false> encode(block_.fc1_input);
    point(rows_.input, channels, first);
    for (int r = 0; r < count; r++)
      norm_codes(block_.norm2, encode, rows_.middle + r * channels,
                 rows_.input + (int64_t)(rows_.inside[r] - first) * channels);
    const GeluEncoder encode_gelu(block_.fc2_input);
    multiply_rows(block_.fc1, rows_.rows, count,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    encode_gelu(y, rows_.hidden + n * COLUMNS +
                                       (rows_.inside[r] - first) * pitch);
                  });
    point(rows_.hidden, pitch, first);
    multiply_rows(block_.fc2, rows_.rows, count,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    const float *x = rows_.middle + r * channels;
                    store16(work_.y + offset(rows_.inside[r]) + n * COLUMNS,
                            load16<Floats>(x + n * COLUMNS) + y);
                  });
  }

 private:
  // Where a trace is wanted, write to its memory instead of the window's own.
  void keep(uint8_t *trace, uint8_t *&own, int first, int64_t pitch) const {
    if (trace != nullptr)
      own = trace + (number_ * shape_.positions + first) * pitch;
  }

  void make_operand(const isvit_product &product,
                    const isvit_quantizer &quantizer, int first, int count,
                    uint8_t *codes, float *reals = nullptr) const {
    const Encoder<false> encode(quantizer);
    multiply_rows(product, rows_.rows, count,
                  [&](int r, int n, const Floats16 &y) ISVIT_INLINE {
                    const int64_t at =
                        (int64_t)(first + r) * block_.channels + n * COLUMNS;
                    encode(y, codes + at);
                    if (reals != nullptr) store16(reals + at, y);
                  });
  }

  Head head_of(int h, int place) const {
    const int at = h * shape_.width, columns = shape_.columns;
    return {window_.query + at,
            window_.key + at,
            window_.value + at,
            window_.mixed + at,
            window_.packed_keys + (int64_t)place * columns * shape_.width *
                                      block_.key_bytes,
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

  const BlockWork &work_;
  const isvit_block &block_;
  const isvit_trace &trace_;
  const Shape &shape_;
  WindowMemory window_;
  RowMemory rows_;
  int64_t number_, first_token_;
  const int32_t *token_, *region_;
};

thread_local Scratch window_scratch, row_scratch;

// Run the phases of one window, `kept` heads at a time.
void run_window(int threads, const BlockWork &work, const Shape &shape,
                int64_t number, const WindowMemory &memory, int kept) {
  const auto own = [&] {
    RowMemory rows;
    row_scratch.lay_out(
        [&] { shape.take(work.block, work.windows, rows, row_scratch); });
    return Window(work, shape, number, memory, rows);
  };
  const int groups = shape.num_groups();
  parallel(threads, shape.num_chunks(),
           [&](int64_t i) { own().make_codes((int)i); });
  for (int h = 0; h < work.block.heads; h += kept) {
    parallel(threads, kept,
             [&](int64_t i) { own().prepare(h + (int)i, (int)i); });
    parallel(threads, (int64_t)kept * groups, [&](int64_t task) {
      const int i = (int)(task / groups);
      own().attend_group(h + i, i, (int)(task % groups));
    });
  }
  parallel(threads, shape.num_chunks(),
           [&](int64_t i) { own().finish((int)i); });
}

}  // namespace

void ISVIT_NAME(run_block)(int32_t threads, const isvit_block &block,
                           const isvit_windows &windows, const float *x,
                           float *y, const isvit_trace &trace) {
  const BlockWork work{block, windows, x, y, trace};
  const int64_t count = (int64_t)windows.images * windows.windows;
  const Shape shape(work);
  const bool is_shared =
      threads > 1 && count < 2 * threads && shape.num_chunks() > 1;
  const int kept = is_shared ? block.heads : 1;
  parallel(is_shared ? 1 : threads, count, [&](int64_t number) {
    WindowMemory memory;
    window_scratch.lay_out(
        [&] { shape.take(block, kept, memory, window_scratch); });
    run_window(is_shared ? threads : 1, work, shape, number, memory, kept);
  });
}
