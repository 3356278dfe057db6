// Activations rounded to int8, block by block, in the order in which the weights' codes leave their bytes.
#pragma once

#include <cmath>
#include <cstring>

#include "matmul.h"

namespace h1 {

struct Activations {
  const int8_t* codes;       // [tokens, stride], in each chunk even columns first (int4); zeros behind the last column
  const float* scales;       // [tokens, blocks]
  const float* corrections;  // [tokens, blocks]: what the weights' zero point adds to scale * sum of products
  size_t stride, blocks;     // blocks of whole chunks
};

// The largest magnitude; NaN if there is one, because its bits are the largest.
inline float largest_magnitude(const float* x, size_t count) {
  uint32_t largest = 0;
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float result;
  std::memcpy(&result, &largest, sizeof result);
  return result;
}

// x * inverse to the nearest integers; returns their sum.
inline int32_t round_to_int8(const float* x, size_t count, float inverse, int8_t* codes) {
  int32_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    const float shifted = x[i] * inverse + 12582912.0f;  // 1.5 * 2^23: the low byte is the nearest integer
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    codes[i] = static_cast<int8_t>(bits);
    total += codes[i];
  }
  return total;
}

// Columns 0 2 4 ... 1 3 5 ... of each chunk.
inline void even_columns_first(int8_t* codes, size_t columns, size_t chunk) {
  int8_t copy[64];
  for (int8_t* c = codes; c < codes + columns; c += chunk) {
    std::memcpy(copy, c, chunk);
    for (size_t i = 0; i < chunk / 2; ++i) c[i] = copy[2 * i], c[chunk / 2 + i] = copy[2 * i + 1];
  }
}

// Round one token. `zero_point` is that of the weights' codes; a correction is spread over `lanes` sums of its block.
template <class F>
void round_token(const float* x, size_t columns, int zero_point, size_t lanes, int8_t* codes, size_t stride, float* scales,
                 float* corrections, size_t blocks) {
  std::memset(codes, 0, stride);
  for (size_t block = 0; block < blocks; ++block) {
    const size_t start = block * F::kBlock, count = start < columns ? std::min(F::kBlock, columns - start) : 0;
    const float largest = largest_magnitude(x + start, count);
    const float inverse = largest > 1e-30f ? 127 / largest : 0;  // smaller ones would overflow; they are zeros
    const int32_t total = round_to_int8(x + start, count, inverse, codes + start);
    scales[block] = largest / 127;
    corrections[block] = -static_cast<float>(zero_point * total) * scales[block] / static_cast<float>(lanes);
  }
  if constexpr (F::kParts == 2) even_columns_first(codes, stride, F::kChunk);
}

}  // namespace h1
