// Dot products of int8, one primitive with a variant for each instruction set.
#pragma once

#include "simd.h"

namespace h1 {

// Eight sums of int8 products: lane i gains w[4i] a[4i] + ... + w[4i + 3] a[4i + 3].
// Dot<4>: w are unsigned and at most 15; at most 8 calls of add, because 16 products of 15 * 127 fill an int16.
// Dot<8>: w are signed; |a| is at most 127.
#if defined(H1_AVX2)
template <int kBits>
struct Dot;

// Whether dot4 is one instruction. H1_DOT4 may be defined on any machine: the same results by the same road, for tests.
#if !defined(H1_DOT4) && (defined(__AVX512VNNI__) && defined(__AVX512VL__) || defined(__AVXVNNI__))
#define H1_DOT4
#endif

inline __m256i dot4(__m256i sum, __m256i u, __m256i s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(sum, u, s);
#elif defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, u, s);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}

template <>
struct Dot<4> {
#if defined(H1_DOT4)
  void add(u8x32 w, s8x32 a) { sums = dot4(sums, (__m256i)w, (__m256i)a); }
  i32x8 total() const { return (i32x8)sums; }
#else
  void add(u8x32 w, s8x32 a) {
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16((__m256i)w, (__m256i)a));
    asm("" : "+x"(sums));  // or GCC adds products to each other first, and runs out of registers for them
  }
  i32x8 total() const { return (i32x8)_mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
#endif
  __m256i sums = _mm256_setzero_si256();
};

template <>
struct Dot<8> {
  // w a = |w| (a with w's sign): unsigned times signed, and no sum of two products leaves an int16
  void add(u8x32 w, s8x32 a) {
    sums = dot4(sums, _mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)a, (__m256i)w));
  }
  i32x8 total() const { return (i32x8)sums; }
  __m256i sums = _mm256_setzero_si256();
};
#elif defined(H1_NEON)
// Signed times signed, of 4 bits too: codes of 15 are positive.
inline int32x4_t dot4(int32x4_t sum, uint8x16_t w, int8x16_t a) {
  const int8x16_t of_w = vreinterpretq_s8_u8(w);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, of_w, a);
#else
  const int16x8_t lower = vmull_s8(vget_low_s8(of_w), vget_low_s8(a)), upper = vmull_high_s8(of_w, a);
  return sum + vpaddq_s32(vpaddlq_s16(lower), vpaddlq_s16(upper));
#endif
}

template <int kBits>
struct Dot {
  void add(u8x32 w, s8x32 a) { sums = {dot4(sums.lower, w.lower, a.lower), dot4(sums.upper, w.upper, a.upper)}; }
  i32x8 total() const { return sums; }
  i32x8 sums{};
};
#else
template <int kBits>
struct Dot {
  void add(u8x32 w, s8x32 a) {
    for (int i = 0; i < 32; ++i) sums[i / 4] += (kBits == 8 ? (int8_t)w[i] : w[i]) * a[i];
  }
  i32x8 total() const { return sums; }
  i32x8 sums{};
};
#endif

}  // namespace h1
