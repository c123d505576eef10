// The threads that all sets of kernels share.
#pragma once

#include <cstdint>
#include <functional>

typedef std::function<void(int64_t)> Task;

// Call task(0), ..., task(count - 1), each once and in any order, on up to
// `threads` threads, the caller among them.
void parallel(int threads, int64_t count, const Task &task);
