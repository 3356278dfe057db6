// Float32 matrix products of operands that are in cache already: chunks of a scan, tiles of attention.
#pragma once

#include <algorithm>

#include "wide.h"

namespace h1 {

// A matrix of any layout: element (i, k) is data[i * row + k * column].
struct Strided {
  const float* data;
  size_t row, column;
};

// What a tile of gemm holds in registers: kTileRows x 2 vectors of sums, beside two vectors of b and one element of a.
#if defined(H1_AVX512)
using Wide = f32x16;
constexpr size_t kTileRows = 12;  // of 32 registers
#else
using Wide = f32x8;
constexpr size_t kTileRows = 6;  // of 16 registers
#endif

// One tile of gemm. Not inlined, and not unrolled by clang, so that nothing else needs a register.
template <class V, size_t Rows, size_t Vectors>
[[gnu::noinline]] void gemm_tile(size_t depth, Strided a, const float* b, size_t b_row, float* c, size_t c_row,
                                 const float* beta) {
  constexpr size_t kWidth = lanes<V>, kTogether = 3;  // rows one address away from a base
  V sum[Rows][Vectors] = {};
  const float* bases[(Rows + kTogether - 1) / kTogether];
  for (size_t i = 0; i < Rows; i += kTogether) bases[i / kTogether] = a.data + i * a.row;
#if defined(__clang__)
#pragma clang loop unroll(disable)
#endif
  for (size_t k = 0; k < depth; ++k) {
    V v[Vectors];
    for (size_t j = 0; j < Vectors; ++j) {
      v[j] = load_bytes<V>(b + j * kWidth);
      if constexpr (Rows > 1) in_register(v[j]);
    }
#pragma GCC unroll 12
    for (size_t i = 0; i < Rows; ++i) {
      const float scalar = bases[i / kTogether][i % kTogether * a.row];
      for (size_t j = 0; j < Vectors; ++j) sum[i][j] += scalar * v[j];
    }
    for (const float*& base : bases) base += a.column;
    b += b_row;
  }
#pragma GCC unroll 12
  for (size_t i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (size_t j = 0; j < Vectors; ++j) {
      float* out = c + i * c_row + j * kWidth;
      if (beta != nullptr) sum[i][j] += beta[i] * load_bytes<V>(out);
      store_bytes(out, sum[i][j]);
    }
  }
}

// Tiles of `Rows` rows, then one of those that are left.
template <class V, size_t Vectors, size_t Rows = kTileRows>
inline void gemm_strip(size_t rows, size_t depth, Strided a, const float* b, size_t b_row, float* c, size_t c_row,
                       const float* beta) {
  for (; rows >= Rows; rows -= Rows, a.data += Rows * a.row, c += Rows * c_row) {
    gemm_tile<V, Rows, Vectors>(depth, a, b, b_row, c, c_row, beta);
    if (beta != nullptr) beta += Rows;
  }
  if constexpr (Rows > 1) {
    if (rows) gemm_strip<V, Vectors, Rows - 1>(rows, depth, a, b, b_row, c, c_row, beta);
  }
}

// c[i] = beta[i] c[i] + (a b)[i] for rows i, or a b where beta is null: a [rows, depth], b [depth, columns] and c
// [rows, columns] row by row; columns a multiple of kLanes.
inline void gemm(size_t rows, size_t columns, size_t depth, Strided a, const float* b, size_t b_row, float* c,
                 size_t c_row, const float* beta) {
  size_t j = 0;
  if (rows == 1) {  // whole rows of b, because memory is the limit
    for (; j + 8 * kLanes <= columns; j += 8 * kLanes) {
      gemm_tile<f32x8, 1, 8>(depth, a, b + j, b_row, c + j, c_row, beta);
    }
  }
  const auto strips = [&]<class V, size_t Vectors>() {
    constexpr size_t kStrip = Vectors * lanes<V>;
    for (; j + kStrip <= columns; j += kStrip) {
      gemm_strip<V, Vectors>(rows, depth, a, b + j, b_row, c + j, c_row, beta);
    }
  };
  strips.template operator()<Wide, 2>();
  strips.template operator()<Wide, 1>();
  if constexpr (lanes<Wide> > kLanes) strips.template operator()<f32x8, 1>();
}

}  // namespace h1
