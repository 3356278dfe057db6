// Vectors of 512 bits where the CPU has them, for kernels that are written over any vector of floats: f32x8 of simd.h
// is the other one.
#pragma once

#include "simd.h"

namespace h1 {

template <class V>
constexpr size_t lanes = sizeof(V) / sizeof(float);

// What load_as<V> reads: f32x8 or f32x16, from floats, halves or codes.
template <class V, class T>
V load_as(const T* p) {
  return load(p);
}

// Vectors that lie one after another. GCC keeps an array in memory that it copies as one block, unless it has vectors of
// its own.
template <class V, size_t Count>
void load_all(const float* p, V (&v)[Count]) {
#if defined(H1_NEON)
  for (size_t i = 0; i < Count; ++i) v[i] = load_bytes<V>(p + i * lanes<V>);
#else
  std::memcpy(v, p, sizeof v);
#endif
}
template <class V, size_t Count>
void store_all(float* p, const V (&v)[Count]) {
#if defined(H1_NEON)
  for (size_t i = 0; i < Count; ++i) store_bytes(p + i * lanes<V>, v[i]);
#else
  std::memcpy(p, v, sizeof v);
#endif
}

// The sums, and the maxima, of a vector's parts of kLanes.
inline f32x8 sum_of_parts(f32x8 v) { return v; }
inline f32x8 max_of_parts(f32x8 v) { return v; }

// Returns the sum of v[i]'s lanes in lane i.
inline f32x8 sums(const f32x8 (&v)[kLanes]) {
#if defined(H1_AVX2)
  const auto add = [](f32x8 a, f32x8 b) { return f32x8(_mm256_hadd_ps(__m256(a), __m256(b))); };
  const f32x8 low = add(add(v[0], v[1]), add(v[2], v[3])), high = add(add(v[4], v[5]), add(v[6], v[7]));
  return f32x8(_mm256_permute2f128_ps(__m256(low), __m256(high), 0x20)) +
         f32x8(_mm256_permute2f128_ps(__m256(low), __m256(high), 0x31));
#elif defined(H1_NEON)
  const auto add = [&v](size_t i) {  // two sums of each of two vectors
    const float64x2_t a = vreinterpretq_f64_f32(v[i].lower + v[i].upper);
    const float64x2_t b = vreinterpretq_f64_f32(v[i + 1].lower + v[i + 1].upper);
    return vreinterpretq_f32_f64(vzip1q_f64(a, b)) + vreinterpretq_f32_f64(vzip2q_f64(a, b));
  };
  return {vpaddq_f32(add(0), add(2)), vpaddq_f32(add(4), add(6))};
#else
  return f32x8{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3]), sum(v[4]), sum(v[5]), sum(v[6]), sum(v[7])};
#endif
}

// Lane j of v[i] becomes lane i of v[j].
inline void transpose(f32x8 (&v)[kLanes]) {
#if defined(H1_AVX2)
  __m256 pairs[kLanes], fours[kLanes];  // of two rows, and of four, in each half
  for (size_t i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  for (size_t i = 0; i < kLanes; i += 4) {
    for (size_t j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
  for (size_t i = 0; i < kLanes / 2; ++i) {
    v[i] = (f32x8)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    v[i + kLanes / 2] = (f32x8)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
#else
  float from[kLanes][kLanes], to[kLanes][kLanes];
  for (size_t i = 0; i < kLanes; ++i) store(from[i], v[i]);
  for (size_t i = 0; i < kLanes; ++i) {
    for (size_t j = 0; j < kLanes; ++j) to[j][i] = from[i][j];
  }
  for (size_t i = 0; i < kLanes; ++i) v[i] = load(to[i]);
#endif
}

#if defined(H1_AVX2) && defined(__AVX512F__)
#define H1_AVX512 1
using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));

template <>
inline f32x16 load_as<f32x16>(const float* p) {
  return load_bytes<f32x16>(p);
}
template <>
inline f32x16 load_as<f32x16>(const Half* p) {
  // GCC 12 warns of the form without a mask, which is the same instruction
  return (f32x16)_mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(p));
}
template <>
inline f32x16 load_as<f32x16>(const int8_t* p) {
  return (f32x16)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, load_bytes<__m128i>(p)));
}

inline f32x16 max(f32x16 a, f32x16 b) { return (f32x16)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
inline f32x16 min(f32x16 a, f32x16 b) { return (f32x16)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
inline i32x16 max(i32x16 a, i32x16 b) { return a > b ? a : b; }
inline i32x16 to_int(f32x16 v) { return __builtin_convertvector(v, i32x16); }
inline f32x16 float_of_bits(i32x16 bits) { return (f32x16)bits; }

inline f32x16 joined(f32x8 lower, f32x8 upper) {
  return __builtin_shufflevector(lower, upper, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
inline f32x8 lower(f32x16 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
inline f32x8 upper(f32x16 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
inline f32x8 sum_of_parts(f32x16 v) { return lower(v) + upper(v); }
inline f32x8 max_of_parts(f32x16 v) { return max(lower(v), upper(v)); }

inline f32x16 sums(const f32x16 (&v)[16]) {
  const auto in_quarters = [](f32x16 a, f32x16 b) {  // sums of pairs, those of a and b in turn
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const auto of_four = [&](size_t i) {  // in each quarter, the sums of the quarters of four vectors
    const f32x16 a = in_quarters(v[i], v[i + 1]), b = in_quarters(v[i + 2], v[i + 3]);
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  };
  const auto quarters = [](f32x16 a, f32x16 b) {  // sums of neighbouring quarters, first those of a
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  return quarters(quarters(of_four(0), of_four(4)), quarters(of_four(8), of_four(12)));
}
#endif

// out[i] = f(i, read) for `width` floats, a vector at a time; read(p) loads as many as there are left, so f reads from
// p + i.
template <class F>
inline void map(float* out, size_t width, const F& f) {
  size_t i = 0;
#if defined(H1_AVX512)
  for (; i + lanes<f32x16> <= width; i += lanes<f32x16>) {
    store_bytes(out + i, f(i, [](const float* p) { return load_bytes<f32x16>(p); }));
  }
#endif
  for (; i + kLanes <= width; i += kLanes) store(out + i, f(i, [](const float* p) { return load(p); }));
  if (const size_t rest = width - i) {
    store_part(out + i, f(i, [rest](const float* p) { return load_part(p, rest); }), rest);
  }
}

}  // namespace h1
