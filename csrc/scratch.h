// Memory that is cut into arrays and used again.
#pragma once

#include <cstdint>
#include <vector>

namespace {

class Scratch {
 public:
  template <class T>
  void take(T *&array, int64_t count) {
    array = base_ == nullptr ? nullptr : (T *)(base_ + next_);
    next_ += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
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
  int64_t next_ = 0;
};

}  // namespace
