// Included before every source, this makes the kernels for VNNI run on any CPU
// with AVX2: SIMDe computes what their instructions would. The compiler has to
// be told not to use them: -mno-avx512f -mno-avxvnni.
#define ISVIT_EMULATED
#define avxvnni_kernels 1
#define avx512vnni_kernels 2
#if ISVIT_KERNELS == avxvnni_kernels
#define ISVIT_AVXVNNI_IS_EMULATED
#elif ISVIT_KERNELS == avx512vnni_kernels
#define ISVIT_AVX512_IS_EMULATED
#endif
#undef avxvnni_kernels
#undef avx512vnni_kernels

#if defined(ISVIT_AVXVNNI_IS_EMULATED) || defined(ISVIT_AVX512_IS_EMULATED)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/permutexvar.h>
#endif

#if defined(ISVIT_AVXVNNI_IS_EMULATED)
#define __AVXVNNI__ 1
// The same instruction in its other encoding.
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#endif

#if defined(ISVIT_AVX512_IS_EMULATED)
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1
// What this SIMDe lacks, in vectors of the compiler.
typedef int isvit_ints __attribute__((vector_size(64)));
typedef unsigned char isvit_bytes __attribute__((vector_size(16)));
typedef float isvit_floats __attribute__((vector_size(64)));
inline __m512i isvit_widen(__m128i bytes) {
  return (__m512i)__builtin_convertvector((isvit_bytes)bytes, isvit_ints);
}
inline __m128i isvit_narrow(unsigned mask, __m512i words) {
  isvit_bytes bytes = __builtin_convertvector((isvit_ints)words, isvit_bytes);
  for (int i = 0; i < 16; i++) bytes[i] &= -(mask >> i & 1);
  return (__m128i)bytes;
}
inline __m512 isvit_gather(__m512i index, const float *table) {
  isvit_floats found;
  for (int i = 0; i < 16; i++) found[i] = table[((isvit_ints)index)[i]];
  return (__m512)found;
}
#define _mm512_cvtepu8_epi32 isvit_widen
#define _mm512_maskz_cvtepi32_epi8 isvit_narrow
#define _mm512_i32gather_ps(index, table, scale) isvit_gather(index, table)
#endif
