// How the cache stores the keys or values of one token for one head, a row: as floats, as halves, or as int8 codes with
// scales. T is float, Half or int8_t.
//
// int8: `dim` codes of -127 to 127, then 2 bytes for the scale of each block of 32 columns. Those are bits 15 to 30 of a
// positive float: its exponent and the upper 8 bits of its mantissa. A block's largest number gets the code 127 or -127,
// so that rows made of what is read give the same bytes again. Scales below 2^-125 are 0, and no number is subnormal; a
// block with an infinity or NaN is NaN in every column.
//   Source: the blocks are those of q8_0 in ggml, ggml-common.h; their scales are halves, whose range is narrower.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"
#include "wide.h"

namespace h1 {

constexpr size_t kScaled = 32;  // columns that share a scale
constexpr size_t kScaleBytes = 2;

// The numbers of a row of `dim` columns.
template <class T>
constexpr size_t stored(size_t dim) {
  return std::is_same_v<T, int8_t> ? dim + dim / kScaled * kScaleBytes : dim;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The columns [d, d + width) of a row, which a reader takes in vectors V.
template <class V, class T>
struct Columns {
  static constexpr size_t width = lanes<V>;
  const T* at;

  static Columns of(const T* row, size_t, size_t d) { return {row + d}; }
  V vector(size_t i) const { return load_as<V>(at + i); }
};

template <class V>
struct Columns<V, int8_t> {
  static constexpr size_t width = kScaled;
  const int8_t* at;
  float scale;

  // d is a multiple of `width`, or of lanes<V> where no more than a vector is read.
  static Columns of(const int8_t* row, size_t dim, size_t d) {
    uint16_t bits;
    std::memcpy(&bits, row + dim + d / kScaled * kScaleBytes, sizeof bits);
    return {row + d, float_of(uint32_t{bits} << 15)};
  }
  V vector(size_t i) const { return load_as<V>(at + i) * scale; }
};

// Stores a row of `dim` columns, a multiple of kLanes.
inline void store_row(float* row, const float* columns, size_t dim) { std::copy_n(columns, dim, row); }
inline void store_row(Half* row, const float* columns, size_t dim) {
  for (size_t d = 0; d < dim; d += kLanes) store(row + d, load(columns + d));
}

// The bits of the scale that is nearest to largest / 127; ties go up.
inline uint16_t scale_bits(float largest) {
  constexpr uint32_t kHalf = 1 << 14, kLeast = 2 << 8;
  const float scale = largest / 127;
  uint32_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  const uint32_t nearest = (bits + kHalf) >> 15;
  return static_cast<uint16_t>(nearest < kLeast ? 0 : nearest);
}

inline void store_row(int8_t* row, const float* columns, size_t dim) {
  constexpr int32_t kInfinite = 255 << 23, kMagnitude = 0x7fffffff;
  constexpr uint16_t kNotANumber = 0xff80;
  for (size_t d = 0; d < dim; d += kScaled) {
    i32x8 tops{};  // magnitudes are in the order of their bits, and infinities and NaN are beyond all others
    for (size_t i = 0; i < kScaled; i += kLanes) {
      const i32x8 bits = load_bytes<i32x8>(columns + d + i) & kMagnitude;
      tops = max(bits, tops);
    }
    int32_t top = 0;
    for (size_t i = 0; i < kLanes; ++i) top = std::max(top, static_cast<int32_t>(tops[i]));
    const bool finite = top < kInfinite;
    const uint16_t bits = finite ? scale_bits(float_of(static_cast<uint32_t>(top))) : kNotANumber;
    std::memcpy(row + dim + d / kScaled * kScaleBytes, &bits, sizeof bits);
    if (bits == 0 || !finite) {
      std::fill_n(row + d, kScaled, int8_t{0});
      continue;
    }
    const f32x8 scale = splat(float_of(uint32_t{bits} << 15));
    const f32x8 round = splat(12582912.0f);  // adding and subtracting 1.5 * 2^23 rounds to an integer, ties to even
    for (size_t i = 0; i < kScaled; i += kLanes) {
      const i32x8 codes =
          to_int((load(columns + d + i) / scale + round) - round);  // at most 127.25 before it is rounded
      for (size_t lane = 0; lane < kLanes; ++lane) row[d + i + lane] = static_cast<int8_t>(codes[lane]);
    }
  }
}

// `count` rows of a cache in float32: where they are, or in `scratch`, which has room for widened<T>(count * dim).
template <class T>
const float* as_floats(const T* rows, size_t count, size_t dim, float* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    return rows;
  } else {
    for (size_t i = 0; i < count; ++i) {
      for (size_t d = 0; d < dim; d += kLanes) {
        store(scratch + i * dim + d, Columns<f32x8, T>::of(rows + i * stored<T>(dim), dim, d).vector(0));
      }
    }
    return scratch;
  }
}

// Sets out[d * stride + i] to column d of row i, for `count` rows, and to zeros for those up to `stride`, a multiple of
// kLanes.
template <class T>
void transpose_rows(const T* rows, size_t count, size_t dim, float* out, size_t stride) {
  for (size_t first = 0; first < stride; first += kLanes) {
    for (size_t d = 0; d < dim; d += kLanes) {
      f32x8 block[kLanes] = {};
      for (size_t i = 0; i < kLanes && first + i < count; ++i) {
        block[i] = Columns<f32x8, T>::of(rows + (first + i) * stored<T>(dim), dim, d).vector(0);
      }
      transpose(block);
      for (size_t i = 0; i < kLanes; ++i) store(out + (d + i) * stride + first, block[i]);
    }
  }
}

template <class T>
constexpr size_t widened(size_t count) {
  return std::is_same_v<T, float> ? 0 : count;
}

}  // namespace h1
