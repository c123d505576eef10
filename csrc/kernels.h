// One set of kernels for each instruction set, and the threads they share.
#ifndef ISVIT_KERNELS_H
#define ISVIT_KERNELS_H

#include "swin.h"

// Work of one call, cut into independent tasks.
struct Tasks {
  void (*run)(const void *what, int64_t task);
  const void *what;
  int64_t count;
};

// Run all tasks on up to `threads` threads, the caller among them.
void run_tasks(int threads, const Tasks &tasks);

struct Kernels {
  void (*encode)(int32_t threads, const isvit_quantizer &, const float *x,
                 const int64_t *strides, int32_t channels, const isvit_map &,
                 uint8_t *codes);
  void (*multiply)(int32_t threads, const isvit_product &, const isvit_rows &,
                   const isvit_output &);
  void (*pool)(int32_t threads, const isvit_pooling &);
  void (*run_swin_block)(int32_t threads, const isvit_swin_block &,
                         const isvit_windows &, const float *x, float *y,
                         const isvit_swin_trace &);
  void (*run_merging)(int32_t threads, const isvit_merging &,
                      const isvit_merged &, const float *x, float *y);
};

extern const Kernels portable_kernels, avx2_kernels, avxvnni_kernels,
    avx512vnni_kernels;

#endif
