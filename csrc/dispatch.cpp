// Detection of the instruction sets that this CPU supports.
#include "runtime.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

ISVIT_API int32_t isvit_supported() {
  int32_t found = 1 << ISVIT_PORTABLE;
#if defined(ISVIT_EMULATED)
  // With tests/runtime/emulated_vnni.h, any CPU with AVX2 runs all of them.
  found = (1 << ISVIT_NUM_ISAS) - 1;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found |= 1 << ISVIT_AVX2;
    unsigned a = 0, b = 0, c = 0, d = 0;
    // AVX-VNNI, whose name not all supported compilers know.
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4))
      found |= 1 << ISVIT_AVXVNNI;
  }
  if (__builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found |= 1 << ISVIT_AVX512VNNI;
#endif
  return found;
}
