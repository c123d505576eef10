// The threads that all sets of kernels share.
#ifndef ISVIT_KERNELS_H
#define ISVIT_KERNELS_H

#include "blocks.h"

// Work of one call, cut into independent tasks.
struct Tasks {
  void (*run)(const void *what, int64_t task);
  const void *what;
  int64_t count;
};

// Run all tasks on up to `threads` threads, the caller among them.
void run_tasks(int threads, const Tasks &tasks);

// Call work(0), ..., work(count - 1), likewise.
template <class Work>
void parallel(int threads, int64_t count, const Work &work) {
  run_tasks(threads, {[](const void *what, int64_t task) {
                        (*(const Work *)what)(task);
                      }, &work, count});
}

#endif
