// QMatMul(x [..., K], codes u8 [N, blocks, bytes], scales [N, blocks], bias [N]?) -> y [..., N]
//   com.microsoft MatMulNBits' storage and meaning. accuracy_level 4 rounds x to int8 by blocks of block_size, 0 computes in float32.
#include "matmul.h"

#include "matmul_float.h"
#include "matmul_rounded.h"
#include "ort.h"

namespace h1 {
namespace {

constexpr int64_t kRounded = 4;  // the accuracy level

using Multiply = void (*)(const Weights&, const float*, size_t, float*, const Parallel&);

template <int kBits, size_t kBlock>
Multiply of_level(int64_t accuracy_level) {
  return accuracy_level == kRounded ? matmul_rounded<Format<kBits, kBlock>> : matmul_float<Format<kBits, kBlock>>;
}

template <int kBits>
Multiply of_block(int64_t block_size, int64_t accuracy_level) {
  switch (block_size) {
    case 16: return of_level<kBits, 16>(accuracy_level);
    case 32: return of_level<kBits, 32>(accuracy_level);
    case 64: return of_level<kBits, 64>(accuracy_level);
    case 128: return of_level<kBits, 128>(accuracy_level);
    default: throw std::invalid_argument("block_size must be 16, 32, 64 or 128");
  }
}

class QMatMul {
 public:
  static constexpr const char* name = "QMatMul";
  static constexpr Port inputs[] = {kFloat, kUInt8, kFloat, kOptionalFloat};
  static constexpr Port outputs[] = {kFloat};

  explicit QMatMul(const Attributes& attributes)
      : columns_(attributes.integer("K")), rows_(attributes.integer("N")), bits_(attributes.integer("bits")),
        block_size_(attributes.integer("block_size")) {
    const int64_t level = attributes.integer("accuracy_level");
    require(columns_ > 0 && rows_ > 0, "K and N must be positive");
    require(bits_ == 4 || bits_ == 8, "bits must be 4 or 8");
    require(level == 0 || level == kRounded, "accuracy_level must be 0 or 4");
    multiply_ = bits_ == 4 ? of_block<4>(block_size_, level) : of_block<8>(block_size_, level);
  }

  void compute(const Call& call) const {
    const auto x = call.input<float>(0);
    const auto codes = call.input<uint8_t>(1);
    const auto scales = call.input<float>(2), bias = call.input<float>(3);
    const int64_t blocks = (columns_ + block_size_ - 1) / block_size_, row_bytes = blocks * block_size_ * bits_ / 8;
    require(!x.shape.empty() && x.last() == columns_, "x must have K columns");
    require(codes.size() == rows_ * row_bytes && scales.size() == rows_ * blocks, "codes and scales must be [N, blocks, ...]");
    require(!bias || bias.size() == rows_, "bias must be [N]");
    Shape shape = x.shape;
    shape.back() = rows_;
    const auto y = call.output<float>(0, shape);
    const auto count = [](int64_t value) { return static_cast<size_t>(value); };
    const Weights weights{codes.data, scales.data, bias.data, count(rows_), count(columns_), count(blocks), count(row_bytes)};
    multiply_(weights, x.data, count(x.rows()), y.data, call.parallel);
  }

 private:
  int64_t columns_, rows_, bits_, block_size_;
  Multiply multiply_;
};

}  // namespace

const OrtCustomOp* qmatmul_op() {
  static const Op<QMatMul> op;
  return &op;
}

}  // namespace h1
