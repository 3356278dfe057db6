// Vectors of 256 bits: the compilers' vector extension, which every CPU has, or pairs of registers (registers_neon.h).
// H1_PORTABLE picks the plain variant of everything anywhere, so that it can be tested.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && !defined(H1_PORTABLE)
#include <immintrin.h>
#define H1_AVX2 1
#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(H1_PORTABLE)
#include "registers_neon.h"
#define H1_NEON 1
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define H1_I8MM 1  // products of 2 x 8 and 8 x 2 bytes
#endif
#endif

namespace h1 {

constexpr size_t kLanes = 8;

#if !defined(H1_NEON)
using f32x8 = float __attribute__((vector_size(32)));
using i32x8 = int32_t __attribute__((vector_size(32)));
using s8x32 = int8_t __attribute__((vector_size(32)));
using u8x32 = uint8_t __attribute__((vector_size(32)));

// Floats: b where a or b is NaN, for which compilers do not find the one instruction.
#if defined(H1_AVX2)
inline f32x8 max(f32x8 a, f32x8 b) { return (f32x8)_mm256_max_ps((__m256)a, (__m256)b); }
inline f32x8 min(f32x8 a, f32x8 b) { return (f32x8)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline f32x8 max(f32x8 a, f32x8 b) { return a > b ? a : b; }
inline f32x8 min(f32x8 a, f32x8 b) { return a < b ? a : b; }
#endif
inline i32x8 max(i32x8 a, i32x8 b) { return a > b ? a : b; }
#endif

template <class Vector>
Vector load_bytes(const void* p) {
#if defined(H1_NEON)
  if constexpr (requires { Vector::at(p); }) return Vector::at(p);
#endif
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class Vector>
void store_bytes(void* p, const Vector& v) {
#if defined(H1_NEON)
  if constexpr (requires { v.copy_to(p); }) return v.copy_to(p);
#endif
  std::memcpy(p, &v, sizeof v);
}

inline f32x8 load(const float* p) { return load_bytes<f32x8>(p); }
inline void store(float* p, f32x8 v) { store_bytes(p, v); }

// Before a loop over an array of vectors, which GCC keeps in memory there unless it unrolls the loop early.
#if defined(H1_NEON)
#define H1_UNROLL _Pragma("GCC unroll 8")
#else
#define H1_UNROLL
#endif

// Keeps a loaded vector in a register, where the compiler would load it again as an operand of every instruction.
template <class V>
void in_register([[maybe_unused]] V& v) {
#if defined(H1_AVX2)
  asm("" : "+v"(v));
#endif
}

// The first `count` < 8 lanes of memory; the others are zeros, or left alone.
inline f32x8 load_part(const float* p, size_t count) {
  f32x8 v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
inline void store_part(float* p, f32x8 v, size_t count) { std::memcpy(p, &v, count * sizeof(float)); }

// The 4 bytes at p, eight times.
inline s8x32 splat4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
#if defined(H1_NEON)
  const int8x16_t fours = vreinterpretq_s8_s32(vdupq_n_s32(four));
  return {fours, fours};
#else
  return (s8x32)(i32x8{} + four);
#endif
}

// a b + c, rounded once where the CPU can. Left to the compiler, that may differ from one instantiation of a template to
// another, and with it what a token's result is beside others.
inline f32x8 fma(f32x8 a, f32x8 b, f32x8 c) {
#if defined(H1_AVX2) && defined(__FMA__)
  return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(H1_NEON)
  return {vfmaq_f32(c.lower, a.lower, b.lower), vfmaq_f32(c.upper, a.upper, b.upper)};
#else
  return a * b + c;
#endif
}
inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(H1_NEON)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline f32x8 splat(float x) {
#if defined(H1_NEON)
  return x;
#else
  return f32x8{x, x, x, x, x, x, x, x};
#endif
}
inline float sum(f32x8 v) {
#if defined(H1_NEON)
  const float32x4_t four = v.lower + v.upper;
  return vaddv_f32(vget_low_f32(four) + vget_high_f32(four));
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

// Whether any lane of a comparison holds.
inline bool any(i32x8 v) {
#if defined(H1_AVX2)
  return _mm256_movemask_ps(_mm256_castsi256_ps(__m256i(v))) != 0;
#elif defined(H1_NEON)
  return vmaxvq_u32(vreinterpretq_u32_s32(vorrq_s32(v.lower, v.upper))) != 0;
#else
  return (v[0] | v[1] | v[2] | v[3] | v[4] | v[5] | v[6] | v[7]) != 0;
#endif
}

inline f32x8 to_float(i32x8 v) {
#if defined(H1_NEON)
  return {vcvtq_f32_s32(v.lower), vcvtq_f32_s32(v.upper)};
#else
  return __builtin_convertvector(v, f32x8);
#endif
}

#if defined(H1_NEON)
inline f32x8 to_float(int8x8_t v) {
  const int16x8_t eight = vmovl_s8(v);
  return to_float(i32x8{vmovl_s16(vget_low_s16(eight)), vmovl_s16(vget_high_s16(eight))});
}
#endif

// Rounded towards zero.
inline i32x8 to_int(f32x8 v) {
#if defined(H1_NEON)
  return {vcvtq_s32_f32(v.lower), vcvtq_s32_f32(v.upper)};
#else
  return __builtin_convertvector(v, i32x8);
#endif
}

inline f32x8 float_of_bits(i32x8 bits) {
#if defined(H1_NEON)
  return {vreinterpretq_f32_s32(bits.lower), vreinterpretq_f32_s32(bits.upper)};
#else
  f32x8 v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
#endif
}

// A float16. Scales of our own are positive and normal; ready-made integers may have any, and each is read as IEEE 754
// says: subnormals and zeros exactly, signs kept, infinities and NaN as what they are in float32.
struct Half {
  uint16_t bits;
};

#if defined(H1_AVX2) && defined(__F16C__)
#define H1_F16C 1  // one instruction, which does not treat subnormals as zeros whatever the thread's mode
#endif

inline float to_float(Half half) {
#if defined(H1_F16C)
  return _cvtsh_ss(half.bits);
#elif defined(H1_NEON)
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half.bits))), 0);
#else
  constexpr int32_t kNormal = 1 << 10, kInfinite = 31 << 10;  // the smallest of their kinds
  constexpr int32_t kBias = (127 - 15) << 23, kInfiniteBias = (255 - 31) << 23;
  const int32_t magnitude = half.bits & 0x7fff;
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;  // normal in float32
  int32_t small;
  std::memcpy(&small, &subnormal, sizeof small);
  const int32_t normal = (magnitude << 13) + (magnitude < kInfinite ? kBias : kInfiniteBias);
  const uint32_t sign = (half.bits & 0x8000u) << 16;
  const uint32_t bits = static_cast<uint32_t>(magnitude < kNormal ? small : normal) | sign;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Rounded to nearest, ties to even; infinite beyond the largest number.
inline Half to_half(float value) {
  constexpr uint32_t kNormal = (127 - 14) << 23, kInfinite = 255u << 23, kUnit = 126u << 23;  // 0.5 counts in 2^-24
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > kInfinite) {
    half = 0x7e00;  // NaN
  } else if (magnitude < kNormal) {
    float rounded;
    std::memcpy(&rounded, &magnitude, sizeof rounded);
    rounded += 0.5f;
    std::memcpy(&half, &rounded, sizeof half);
    half -= kUnit;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - ((127 - 15) << 23)) >> 13;
    if (half > 0x7c00u) half = 0x7c00;
  }
  return {static_cast<uint16_t>(half | sign)};
}

inline f32x8 load(const Half* p) {
#if defined(H1_F16C)
  return (f32x8)_mm256_cvtph_ps(load_bytes<__m128i>(p));
#elif defined(H1_NEON)
  const auto four = [p](size_t at) { return vcvt_f32_f16(vreinterpret_f16_u16(load_bytes<uint16x4_t>(p + at))); };
  return {four(0), four(4)};
#else
  f32x8 v;
  for (size_t i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Eight codes.
inline f32x8 load(const int8_t* p) {
#if defined(H1_AVX2)
  return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_bytes<int64_t>(p))));
#elif defined(H1_NEON)
  return to_float(load_bytes<int8x8_t>(p));
#else
  f32x8 v;
  for (size_t i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

inline void store(Half* p, f32x8 v) {
#if defined(H1_F16C)
  const __m128i halves = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &halves, sizeof halves);
#elif defined(H1_NEON)
  const float16x8_t eight = vcombine_f16(vcvt_f16_f32(v.lower), vcvt_f16_f32(v.upper));
  std::memcpy(p, &eight, sizeof eight);
#else
  for (size_t i = 0; i < kLanes; ++i) p[i] = to_half(v[i]);
#endif
}

// The halves at s, each repeated: 8 / kDistinct times. Written out where compilers go through memory.
template <int kDistinct>
f32x8 repeat(const Half* s) {
  static_assert(kDistinct == 1 || kDistinct == 2 || kDistinct == 4);
#if defined(H1_F16C)
  if constexpr (kDistinct == 1) {
    return (f32x8)_mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(s->bits)));
  } else if constexpr (kDistinct == 2) {
    int32_t two;
    std::memcpy(&two, s, sizeof two);
    const __m128i places = _mm_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3);
    return (f32x8)_mm256_cvtph_ps(_mm_shuffle_epi8(_mm_cvtsi32_si128(two), places));
  } else {
    int64_t four;
    std::memcpy(&four, s, sizeof four);
    const __m128i halves = _mm_cvtsi64_si128(four);
    return (f32x8)_mm256_cvtph_ps(_mm_unpacklo_epi16(halves, halves));
  }
#elif defined(H1_NEON)
  const auto one = [s](size_t i) { return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(s[i].bits))); };
  if constexpr (kDistinct == 1) {
    return {one(0), one(0)};
  } else if constexpr (kDistinct == 2) {
    return {one(0), one(1)};
  } else {
    uint16x4_t four;
    std::memcpy(&four, s, sizeof four);
    const float32x4_t floats = vcvt_f32_f16(vreinterpret_f16_u16(four));
    return {vzip1q_f32(floats, floats), vzip2q_f32(floats, floats)};
  }
#else
  float distinct[kDistinct];
  for (size_t i = 0; i < kDistinct; ++i) distinct[i] = to_float(s[i]);
  f32x8 result;
  for (size_t i = 0; i < kLanes; ++i) result[i] = distinct[i * kDistinct / kLanes];
  return result;
#endif
}

}  // namespace h1
