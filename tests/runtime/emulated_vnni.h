// Included before every source (make test-vnni), this lets the kernels for VNNI
// run on any CPU with AVX2: SIMDe emulates their instructions. The compiler
// must not use those itself: -mno-avx512f -mno-avxvnni.
#define ISVIT_EMULATED
#define avxvnni 1
#define avx512vnni 2
#if ISVIT_KERNELS == 1 || ISVIT_KERNELS == 2
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/permutexvar.h>
#endif
#if ISVIT_KERNELS == 1
#define __AVXVNNI__ 1
// The same instruction in its other encoding.
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#elif ISVIT_KERNELS == 2
#define __AVX512F__ 1
#define __AVX512VNNI__ 1
// Intrinsics that SIMDe may lack, in the compiler's own vectors.
typedef int isvit_ints __attribute__((vector_size(64)));
typedef unsigned char isvit_bytes __attribute__((vector_size(16)));
#define _mm512_cvtepu8_epi32(bytes) \
  ((__m512i)__builtin_convertvector((isvit_bytes)(bytes), isvit_ints))
#define _mm512_maskz_cvtepi32_epi8(mask, ints) \
  ((__m128i)__builtin_convertvector((isvit_ints)(ints), isvit_bytes))
inline __m512 isvit_fmadd(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
#define _mm512_fmadd_ps(a, b, c) isvit_fmadd(a, b, c)
#endif
#undef avxvnni
#undef avx512vnni
