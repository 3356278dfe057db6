// Float32 matrix products of operands that are in cache already: chunks of a scan, tiles of attention.
#pragma once

#include <algorithm>

#include "simd.h"

namespace h1 {

// A matrix of any layout: element (i, k) is data[i * row + k * column].
struct Strided {
  const float* data;
  size_t row, column;
};

// One tile of gemm, held in registers: 6 x 2 vectors leave room for two of b and one element of a. Not inlined, and not
// unrolled by clang, so that nothing else needs a register.
template <size_t Rows, size_t Vectors>
[[gnu::noinline]] void gemm_tile(size_t depth, Strided a, const float* b, size_t b_row, float* c, size_t c_row,
                                 const float* beta) {
  f32x8 sum[Rows][Vectors] = {};
  // two bases: with each, three rows are one address away
  const float *upper = a.data, *lower = upper + (Rows / 2) * a.row;
#if defined(__clang__)
#pragma clang loop unroll(disable)
#endif
  for (size_t k = 0; k < depth; ++k) {
    f32x8 v[Vectors];
    for (size_t j = 0; j < Vectors; ++j) {
      v[j] = load(b + j * kLanes);
      if constexpr (Rows > 1) in_register(v[j]);
    }
    for (size_t i = 0; i < Rows; ++i) {
      const float scalar = i < Rows / 2 ? upper[i * a.row] : lower[(i - Rows / 2) * a.row];
      for (size_t j = 0; j < Vectors; ++j) sum[i][j] += scalar * v[j];
    }
    upper += a.column;
    lower += a.column;
    b += b_row;
  }
#pragma GCC unroll 6
  for (size_t i = 0; i < Rows; ++i) {
#pragma GCC unroll 6
    for (size_t j = 0; j < Vectors; ++j) {
      float* out = c + i * c_row + j * kLanes;
      if (beta != nullptr) sum[i][j] += beta[i] * load(out);
      store(out, sum[i][j]);
    }
  }
}

// Tiles of `Rows` rows, then one of those that are left.
template <size_t Vectors, size_t Rows = 6>
inline void gemm_strip(size_t rows, size_t depth, Strided a, const float* b, size_t b_row, float* c, size_t c_row,
                       const float* beta) {
  for (; rows >= Rows; rows -= Rows, a.data += Rows * a.row, c += Rows * c_row) {
    gemm_tile<Rows, Vectors>(depth, a, b, b_row, c, c_row, beta);
    if (beta != nullptr) beta += Rows;
  }
  if constexpr (Rows > 1) {
    if (rows) gemm_strip<Vectors, Rows - 1>(rows, depth, a, b, b_row, c, c_row, beta);
  }
}

// c[i] = beta[i] c[i] + (a b)[i] for rows i, or a b where beta is null: a [rows, depth], b [depth, columns] and c
// [rows, columns] row by row; columns a multiple of kLanes.
inline void gemm(size_t rows, size_t columns, size_t depth, Strided a, const float* b, size_t b_row, float* c,
                 size_t c_row, const float* beta) {
  size_t j = 0;
  if (rows == 1) {  // whole rows of b, because memory is the limit
    for (; j + 8 * kLanes <= columns; j += 8 * kLanes) gemm_tile<1, 8>(depth, a, b + j, b_row, c + j, c_row, beta);
  }
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) gemm_strip<2>(rows, depth, a, b + j, b_row, c + j, c_row, beta);
  if (j < columns) gemm_strip<1>(rows, depth, a, b + j, b_row, c + j, c_row, beta);
}

}  // namespace h1
