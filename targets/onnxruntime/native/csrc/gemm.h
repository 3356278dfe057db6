// Float32 matrix products of operands that are in cache already: chunks of a scan, tiles of attention.
#pragma once

#include <type_traits>

#include "simd.h"

namespace h1 {

// out[i] = f(i, read) for `width` floats, a vector at a time; read(p) loads as many as there are, so f reads from p + i.
template <class F>
inline void map(float* out, size_t width, const F& f) {
  const size_t rest = width % kLanes, whole = width - rest;
  for (size_t i = 0; i < whole; i += kLanes) store(out + i, f(i, [](const float* p) { return load(p); }));
  if (rest) store_part(out + whole, f(whole, [rest](const float* p) { return load_part(p, rest); }), rest);
}

// A matrix of any layout: element (i, k) is data[i * row + k * column].
struct Strided {
  const float* data;
  size_t row, column;

  Strided from(size_t i) const { return {data + i * row, row, column}; }
};

// One tile of gemm, held in registers: 6 x 2 vectors leave room for two of b and one element of a.
template <size_t Rows, size_t Vectors>
inline void gemm_tile(size_t depth, Strided a, const float* b, size_t b_row, float* c, size_t c_row, float beta) {
  f32x8 sum[Rows][Vectors] = {};
  for (size_t k = 0; k < depth; ++k) {
    f32x8 v[Vectors];
    for (size_t j = 0; j < Vectors; ++j) v[j] = load(b + k * b_row + j * kLanes);
    for (size_t i = 0; i < Rows; ++i) {
      const float scalar = a.data[i * a.row + k * a.column];
      for (size_t j = 0; j < Vectors; ++j) sum[i][j] += scalar * v[j];
    }
  }
  for (size_t i = 0; i < Rows; ++i) {
    for (size_t j = 0; j < Vectors; ++j) {
      float* out = c + i * c_row + j * kLanes;
      store(out, beta == 0 ? sum[i][j] : sum[i][j] + beta * load(out));
    }
  }
}

template <size_t Vectors>
inline void gemm_strip(size_t rows, size_t depth, Strided a, const float* b, size_t b_row, float* c, size_t c_row, float beta) {
  size_t i = 0;
  const auto tile = [&](auto size) {
    constexpr size_t n = decltype(size)::value;
    for (; i + n <= rows; i += n) gemm_tile<n, Vectors>(depth, a.from(i), b, b_row, c + i * c_row, c_row, beta);
  };
  tile(std::integral_constant<size_t, 6>{});
  tile(std::integral_constant<size_t, 4>{});
  tile(std::integral_constant<size_t, 1>{});
}

// c = a b + beta c: a [rows, depth], b [depth, columns] and c [rows, columns] row by row; columns a multiple of kLanes. With beta 0
// the old c is not read.
inline void gemm(size_t rows, size_t columns, size_t depth, Strided a, const float* b, size_t b_row, float* c, size_t c_row, float beta) {
  size_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) gemm_strip<2>(rows, depth, a, b + j, b_row, c + j, c_row, beta);
  if (j < columns) gemm_strip<1>(rows, depth, a, b + j, b_row, c + j, c_row, beta);
}

}  // namespace h1
