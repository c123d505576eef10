// The C interface: which kernels this CPU runs, and the way to them.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

ISVIT_API int32_t isvit_version() { return ISVIT_VERSION; }

ISVIT_API int32_t isvit_supported() {
  int32_t found = 1 << ISVIT_PORTABLE;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) {
    found |= 1 << ISVIT_AVX2;
    unsigned a = 0, b = 0, c = 0, d = 0;
    // The compilers' own name for it is younger than they are.
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4))
      found |= 1 << ISVIT_AVXVNNI;
  }
  if (__builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found |= 1 << ISVIT_AVX512VNNI;
#endif
  return found;
}

static const Kernels &kernels_of(isvit_isa isa) {
#if defined(__x86_64__)
  if (isa == ISVIT_AVX2) return avx2_kernels;
  if (isa == ISVIT_AVXVNNI) return avxvnni_kernels;
  if (isa == ISVIT_AVX512VNNI) return avx512vnni_kernels;
#endif
  return portable_kernels;
}

ISVIT_API void isvit_encode(isvit_isa isa, int32_t threads,
                            const isvit_quantizer *quantizer, const float *x,
                            const int64_t *strides, int32_t channels,
                            const isvit_map *map, uint8_t *codes) {
  kernels_of(isa).encode(threads, *quantizer, x, strides, channels, *map,
                         codes);
}

ISVIT_API void isvit_multiply(isvit_isa isa, int32_t threads,
                              const isvit_product *product,
                              const isvit_rows *rows,
                              const isvit_output *output) {
  kernels_of(isa).multiply(threads, *product, *rows, *output);
}

ISVIT_API void isvit_pool(isvit_isa isa, int32_t threads,
                          const isvit_pooling *pooling) {
  kernels_of(isa).pool(threads, *pooling);
}

ISVIT_API void isvit_run_swin_block(isvit_isa isa, int32_t threads,
                                    const isvit_swin_block *block,
                                    const isvit_windows *windows,
                                    const float *x, float *y,
                                    const isvit_swin_trace *trace) {
  kernels_of(isa).run_swin_block(threads, *block, *windows, x, y, *trace);
}

ISVIT_API void isvit_run_merging(isvit_isa isa, int32_t threads,
                                 const isvit_merging *merging,
                                 const isvit_merged *merged, const float *x,
                                 float *y) {
  kernels_of(isa).run_merging(threads, *merging, *merged, x, y);
}
