// Working memory that is divided into arrays and reused by the next call.
#pragma once

#include <cstdint>
#include <vector>

namespace {

class Scratch {
 public:
  // Set each array to the next `count` elements, aligned to 64 bytes.
  template <class... T>
  void take(int64_t count, T *&...arrays) { (take_one(count, arrays), ...); }
  // Run `layout`, which takes the arrays: first to measure their total size,
  // then to set their addresses.
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
  template <class T>
  void take_one(int64_t count, T *&array) {
    array = base_ == nullptr ? nullptr : (T *)(base_ + next_);
    next_ += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
  }

  std::vector<uint8_t> memory_;
  uint8_t *base_ = nullptr;
  int64_t next_ = 0;
};

}  // namespace
