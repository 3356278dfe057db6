// What both drivers share: random operands, and the check of a product against one in double.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

struct Sizes {
  size_t rows, columns, tokens, repeats;
};

// The words from `first` on: rows, columns, tokens, repeats.
inline Sizes sizes_of(char** first) {
  const auto size = [&](int i) { return static_cast<size_t>(std::atoll(first[i])); };
  return {.rows = size(0), .columns = size(1), .tokens = size(2), .repeats = size(3)};
}

inline std::vector<float> normal(size_t count, unsigned seed) {
  std::mt19937 bits(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = distribution(bits);
  return values;
}

// Prints the error of y [tokens, rows] relative to the root mean square of the product in double of weights [rows,
// columns] and x [tokens, columns]; all tokens, and every 61st row, for which alone `weight` is asked.
template <class Weight>
void print_error(const Sizes& sizes, const float* x, const float* y, const Weight& weight) {
  double error = 0, square = 0;
  for (size_t row = 0; row < sizes.rows; row += 61) {
    std::vector<double> of_row(sizes.columns);
    for (size_t k = 0; k < sizes.columns; ++k) of_row[k] = weight(row, k);
    for (size_t t = 0; t < sizes.tokens; ++t) {
      double exact = 0;
      for (size_t k = 0; k < sizes.columns; ++k) exact += of_row[k] * static_cast<double>(x[t * sizes.columns + k]);
      error += std::pow(static_cast<double>(y[t * sizes.rows + row]) - exact, 2);
      square += exact * exact;
    }
  }
  std::printf("%.3e\n", std::sqrt(error / square));
}
