// What the kernels of QMatMul share: the weights as stored, and the work that a thread takes at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.h"
#include "simd.h"

namespace h1 {

// Weights as an artifact stores them (targets/onnxruntime/emit/packing.py): weight = factor * scale * (code - zero
// point); the last block is padded.
struct Weights {
  const uint8_t* codes;  // [rows, blocks * bytes of a block]; int4: even columns in low nibbles
  const Half* scales;    // [rows, blocks]
  const float* factors;  // [rows], or null for ones
  const float* bias;     // [rows], or null for zeros
  size_t rows, columns, blocks, row_bytes;

  float factor(size_t row) const { return factors ? factors[row] : 1.0f; }
  float finish(size_t row, float sum) const { return fma(sum, factor(row), bias ? bias[row] : 0.0f); }
};

constexpr size_t kAhead = 4096;  // bytes of codes fetched ahead with few tokens: memory answers late

// The tokens of a product: rows of x.
struct Tokens {
  size_t count;
  bool apart;  // each is the only one of its sequence: its y must not depend on how many sequences there are
};

// y[t, n] = bias[n] + sum_k x[t, k] * weight[n, k], with x rounded to int8 by blocks, or in float32.
template <class F>
void matmul_rounded(const Weights& w, const float* x, Tokens tokens, float* y, const Parallel& parallel);
template <class F>
void matmul_float(const Weights& w, const float* x, Tokens tokens, float* y, const Parallel& parallel);

// Sizes of one weight format. A row is cut into chunks of 32 bytes, and these into words of 4 bytes.
template <int kBitsOf, size_t kBlockOf>
struct Format {
  static constexpr int kBits = kBitsOf;
  static constexpr size_t kBlock = kBlockOf;
  static constexpr size_t kParts = 8 / kBits;  // columns of a byte
  static constexpr size_t kChunkBytes = 32;
  static constexpr size_t kChunk = kChunkBytes * kParts;  // columns of a chunk
  static constexpr size_t kWords = kBlock / kParts / 4;   // words of a block
  static constexpr int kZeroPoint = 1 << (kBits - 1);
};

}  // namespace h1
