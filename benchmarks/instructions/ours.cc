// ours ROWS COLUMNS TOKENS REPEATS: QMatMul at accuracy level 4 as the CPU kernels compute it, int4 in blocks of 32, on
// one thread, so many times; prints the error.
#include <matmul_rounded.h>

#include "product.h"

int main(int count, char** words) {
  if (count != 5) return 2;
  constexpr size_t kBlock = 32;
  const Sizes sizes = sizes_of(words + 1);
  const size_t blocks = sizes.columns / kBlock;
  std::mt19937 bits(1);
  std::vector<uint8_t> codes(sizes.rows * sizes.columns / 2);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(bits());
  std::vector<h1::Half> scales(sizes.rows * blocks);
  for (h1::Half& scale : scales) scale = static_cast<h1::Half>(0x2000 + bits() % 0x400);  // 2^-7 to 2^-6
  const std::vector<float> x = normal(sizes.tokens * sizes.columns, 2);
  std::vector<float> y(sizes.tokens * sizes.rows);
  const h1::Weights weights{.codes = codes.data(),
                            .scales = scales.data(),
                            .factors = nullptr,
                            .bias = nullptr,
                            .rows = sizes.rows,
                            .columns = sizes.columns,
                            .blocks = blocks,
                            .row_bytes = sizes.columns / 2};
  const h1::Parallel one_thread = [](size_t items, const std::function<void(size_t)>& body) {
    for (size_t item = 0; item < items; ++item) body(item);
  };
  for (size_t i = 0; i < sizes.repeats; ++i) {
    const h1::Tokens tokens{.count = sizes.tokens, .apart = sizes.tokens == 1};
    h1::matmul_rounded<h1::Format<4, kBlock>>(weights, x.data(), tokens, y.data(), one_thread);
  }
  print_error(sizes, x.data(), y.data(), [&](size_t row, size_t k) {
    const size_t at = row * sizes.columns + k;
    return static_cast<double>(h1::to_float(scales[at / kBlock])) * ((codes[at / 2] >> at % 2 * 4 & 15) - 8);
  });
}
