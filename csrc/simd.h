// Arithmetic on sixteen floats or integers at a time, in as many vector
// registers as the CPU needs for them. A multiplication and an addition are
// fused only where multiply_add says so, so that every CPU rounds alike.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef ISVIT_INLINE
#define ISVIT_INLINE __attribute__((always_inline))
#endif
// For functions whose loops need all registers: inlined, they would share them.
#define ISVIT_APART __attribute__((noinline))

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// Outputs of a block of packed weights, and the vectors that hold them.
constexpr int COLUMNS = 16;
constexpr int PARTS = COLUMNS / LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(COLUMNS)));

// Sixteen numbers, one for each output of a block.
template <class V>
struct Sixteen { V part[PARTS]; };
typedef Sixteen<Floats> Floats16;
typedef Sixteen<Ints> Ints16;

template <int I>
using Constant = std::integral_constant<int, I>;
// Call f(0), ..., f(N - 1) with compile-time constants as arguments: an array
// stays in registers only if all of its indices are constants.
template <class F, int... I>
inline ISVIT_INLINE void repeat(F &&f, std::integer_sequence<int, I...>) {
  (f(Constant<I>()), ...);
}
template <int N, class F>
inline ISVIT_INLINE void repeat(F &&f) {
  repeat(f, std::make_integer_sequence<int, N>());
}

template <class V, class T>
inline V load(const T *from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V, class T>
inline void store(T *to, const V &v) { std::memcpy(to, &v, sizeof v); }

// Load or store sixteen numbers vector by vector. Compilers would split one
// memcpy into pieces narrower than a vector, and reading those back stalls.
template <class V, class T>
inline ISVIT_INLINE Sixteen<V> load16(const T *from) {
  Sixteen<V> x;
  repeat<PARTS>(
      [&](auto j) ISVIT_INLINE { x.part[j] = load<V>(from + j * LANES); });
  return x;
}
template <class V, class T>
inline ISVIT_INLINE void store16(T *to, const Sixteen<V> &x) {
  repeat<PARTS>(
      [&](auto j) ISVIT_INLINE { store(to + j * LANES, x.part[j]); });
}

inline Floats splat(float x) { return x - Floats{}; }
inline Ints splat(int32_t x) { return x - Ints{}; }
inline Ints whole(Floats x) { return __builtin_convertvector(x, Ints); }
inline Floats to_float(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// a * b + c, rounded once on every CPU.
inline ISVIT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  Floats sum;
  for (int i = 0; i < LANES; i++) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sum;
#endif
}

// a[0] * b[0] + a[1] * b[1] of the pairs of int16 in every lane.
inline ISVIT_INLINE Ints multiply_pairs(Ints a, Ints b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Apply f to sixteen numbers, vector by vector. Arguments of other types, such
// as a scale that all share, are passed to every call unchanged.
template <class V>
inline ISVIT_INLINE const V &vector_of(const Sixteen<V> &x, int j) {
  return x.part[j];
}
template <class T>
inline ISVIT_INLINE const T &vector_of(const T &x, int) { return x; }
template <class F, class... X>
inline ISVIT_INLINE auto map16(F &&f, const X &...x) {
  Sixteen<decltype(f(vector_of(x, 0)...))> y;
  repeat<PARTS>([&](auto j) ISVIT_INLINE {
    y.part[j] = f(vector_of(x, j)...);
  });
  return y;
}

template <class V, class T>
inline ISVIT_INLINE Sixteen<V> operator+(const Sixteen<V> &a, const T &b) {
  return map16([](V x, auto y) ISVIT_INLINE { return x + y; }, a, b);
}
template <class V, class T>
inline ISVIT_INLINE Sixteen<V> operator-(const Sixteen<V> &a, const T &b) {
  return map16([](V x, auto y) ISVIT_INLINE { return x - y; }, a, b);
}
template <class V, class T>
inline ISVIT_INLINE Sixteen<V> operator*(const Sixteen<V> &a, const T &b) {
  return map16([](V x, auto y) ISVIT_INLINE { return x * y; }, a, b);
}
inline ISVIT_INLINE Floats16 to_float(const Ints16 &x) {
  return map16([](Ints v) ISVIT_INLINE { return to_float(v); }, x);
}
template <class A, class B>
inline ISVIT_INLINE Floats16 multiply_add(const A &a, const B &b,
                                          const Floats16 &c) {
  return map16([](Floats x, Floats y, Floats z) ISVIT_INLINE {
    return multiply_add(x, y, z);
  }, a, b, c);
}

// Round to the nearest integer, ties to even; |x| <= 2^22.
inline ISVIT_INLINE Ints nearest(Floats x) {
  const Floats magic = splat(12582912.f);  // 1.5 * 2^23: leaves no fraction
  return (Ints)(x + magic) - (Ints)magic;
}

// A polynomial by Horner's scheme; the highest power's coefficient comes first.
template <int N>
inline ISVIT_INLINE Floats polynomial(Floats x, const float (&terms)[N]) {
  Floats sum = splat(terms[0]);
  repeat<N - 1>([&](auto i) ISVIT_INLINE {
    sum = multiply_add(sum, x, splat(terms[i + 1]));
  });
  return sum;
}

// e^x for x <= 0, within 2 ulp; 0 below -87.
inline ISVIT_INLINE Floats exponential(Floats x) {
  // Taylor series of e^rest, |rest| <= ln(2) / 2.
  constexpr float taylor[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24,
                              1.f / 6,    .5f,       1.f,       1.f};
  const Floats floor = splat(-87.f);
  const Floats clamped = larger(x, floor);
  const Ints power = nearest(clamped * 1.44269504f);
  const Floats k = to_float(power);
  // Cody and Waite: ln 2 in two parts, so that k times the first is exact.
  Floats rest = multiply_add(k, splat(-.693359375f), clamped);
  rest = multiply_add(k, splat(2.12194440e-4f), rest);
  const Floats scaled =
      (Floats)((Ints)polynomial(rest, taylor) + (power << 23));
  return x < floor ? Floats{} : scaled;
}

// x * Phi(x), the exact GELU, with the normal distribution Phi by formula
// 7.1.26 of Abramowitz and Stegun (absolute error 1.5e-7).
inline ISVIT_INLINE Floats gelu(Floats x) {
  constexpr float tail[] = {1.061405429f, -1.453152027f, 1.421413741f,
                            -.284496736f, .254829592f,   0.f};
  const Floats z = (x < 0.f ? -x : x) * .70710678f;
  const Floats t = 1.f / multiply_add(z, splat(.3275911f), splat(1.f));
  const Floats half_tail = polynomial(t, tail) * exponential(-(z * z)) * .5f;
  return x * (x < 0.f ? half_tail : 1.f - half_tail);
}

// Sixteen bytes as integers.
inline ISVIT_INLINE Ints16 load_codes(const uint8_t *from) {
  Ints16 codes;
#if defined(__AVX512F__)
  codes.part[0] = (Ints)_mm512_cvtepu8_epi32(load<__m128i>(from));
#elif defined(__AVX2__)
  codes.part[0] = (Ints)_mm256_cvtepu8_epi32(_mm_loadu_si64(from));
  codes.part[1] = (Ints)_mm256_cvtepu8_epi32(_mm_loadu_si64(from + LANES));
#else
  for (int i = 0; i < COLUMNS; i++) codes.part[i / LANES][i % LANES] = from[i];
#endif
  return codes;
}

// Sixteen integers as bytes.
inline ISVIT_INLINE Bytes narrow(const Ints16 &x) {
#if defined(__AVX512F__)
  return (Bytes)_mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)x.part[0]);
#elif defined(__AVX2__)
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packs_epi32((__m256i)x.part[0], (__m256i)x.part[1]), 0xD8);
  return (Bytes)_mm_packus_epi16(_mm256_castsi256_si128(words),
                                 _mm256_extracti128_si256(words, 1));
#else
  Bytes bytes;
  for (int i = 0; i < COLUMNS; i++) bytes[i] = x.part[i / LANES][i % LANES];
  return bytes;
#endif
}

// table[index % 16] and table[index % 32] of each index.
inline ISVIT_INLINE Bytes pick(Bytes table, Bytes index) {
#if defined(__AVX2__)
  return (Bytes)_mm_shuffle_epi8((__m128i)table, (__m128i)(index & 15));
#else
  Bytes found;
  for (int i = 0; i < COLUMNS; i++) found[i] = table[index[i] & 15];
  return found;
#endif
}
inline ISVIT_INLINE Bytes pick(const Bytes (&table)[2], Bytes index) {
  return (index & 16) != 0 ? pick(table[1], index) : pick(table[0], index);
}

// Transpose 4 x 4 floats; strides are between rows.
inline void transpose(const float *from, int64_t stride, float *to,
                      int64_t to_stride) {
#if defined(__x86_64__)
  __m128 rows[4];
  repeat<4>([&](auto i) ISVIT_INLINE {
    rows[i] = load<__m128>(from + i * stride);
  });
  _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
  repeat<4>([&](auto i) ISVIT_INLINE { store(to + i * to_stride, rows[i]); });
#else
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) to[j * to_stride + i] = from[i * stride + j];
#endif
}

// Transpose 16 x 16 bytes in place.
inline void transpose(uint8_t square[16][16]) {
#if defined(__x86_64__)
  // Interleaving row i with row i + 8 four times moves every byte's row number
  // into its column.
  __m128i rows[16], mixed[16];
  repeat<16>([&](auto i) ISVIT_INLINE { rows[i] = load<__m128i>(square[i]); });
  repeat<4>([&](auto) ISVIT_INLINE {
    repeat<8>([&](auto i) ISVIT_INLINE {
      mixed[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
      mixed[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
    });
    repeat<16>([&](auto i) ISVIT_INLINE { rows[i] = mixed[i]; });
  });
  repeat<16>([&](auto i) ISVIT_INLINE { store(square[i], rows[i]); });
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < i; j++) std::swap(square[i][j], square[j][i]);
#endif
}

}  // namespace
