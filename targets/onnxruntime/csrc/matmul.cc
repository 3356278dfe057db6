// Products with quantised weights [N, K], codes as com.microsoft MatMulNBits stores them, and what precedes them in a
// layer:
//
// QMatMul(x [..., K], W...) -> y [..., N]
// NormQMatMul(a [..., K], b [..., K], norm [K], W...) -> y [..., N], sum [..., K]
//   x = rms_norm(a + b, epsilon) * norm, sum = a + b
// PairQMatMul(a [..., Ka], b [..., Kb], W...) -> y [..., N]
//   x = [a a_factor | b b_factor]
// SiluQMatMul(a [..., Wa], gate [..., Wg], W...) -> y [..., N]
//   x = a[a_offset : +K] * silu(gate[gate_offset : +K])
//
// W... is codes u8 [N, blocks, bytes], scales f16 [N, blocks], factors [N]?, bias [N]?, and
// y = factors * (x codes scales) + bias. accuracy_level 4 rounds x to int8 by blocks of block_size, 0 computes in
// float32. Each op saves a node, whose few microseconds nothing hides when there is one token.
#include "matmul.h"

#include "matmul_float.h"
#include "matmul_rounded.h"
#include "ort.h"
#include "simd.h"

namespace h1 {
namespace {

constexpr int64_t kRounded = 4;   // the accuracy level
constexpr size_t kGrain = 16384;  // elements of x that a thread makes at a time: some microseconds

using Multiply = void (*)(const Weights&, const float*, size_t, float*, const Parallel&);

template <int kBits, size_t kBlock>
Multiply of_level(int64_t accuracy_level) {
  return accuracy_level == kRounded ? matmul_rounded<Format<kBits, kBlock>> : matmul_float<Format<kBits, kBlock>>;
}

template <int kBits>
Multiply of_block(int64_t block_size, int64_t accuracy_level) {
  switch (block_size) {
    case 16:
      return of_level<kBits, 16>(accuracy_level);
    case 32:
      return of_level<kBits, 32>(accuracy_level);
    case 64:
      return of_level<kBits, 64>(accuracy_level);
    case 128:
      return of_level<kBits, 128>(accuracy_level);
    default:
      throw std::invalid_argument("block_size must be 16, 32, 64 or 128");
  }
}

// The x of a product, and its shape; the last dimension, K, does not count.
struct Factor {
  const float* x;
  Shape shape;
};

// Returns x with the rows of `like`, each computed by make(row, to), in memory of the calling thread.
template <class Make>
Factor made(const Call& call, const Tensor<const float>& like, int64_t columns, const Make& make) {
  static thread_local Scratch<float> memory;
  const auto width = static_cast<size_t>(columns), rows = static_cast<size_t>(like.rows());
  float* const x = memory.get(rows * width);
  parallel_ranges(call.parallel, rows, std::max<size_t>(1, kGrain / width), [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row) make(row, x + row * width);
  });
  return {.x = x, .shape = like.shape};
}

float sum_of_squares(const float* x, size_t count) {
  f32x8 sums{};
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums += load(x + i) * load(x + i);
  if (i < count) {
    const f32x8 last = load_part(x + i, count - i);
    sums += last * last;
  }
  return sum(sums);
}

struct Plain {
  static constexpr const char* name = "QMatMul";
  static constexpr Port inputs[] = {kFloat, kUInt8, kHalf, kOptionalFloat, kOptionalFloat};
  static constexpr Port outputs[] = {kFloat};
  static constexpr size_t kWeights = 1;  // the input where W... begins

  explicit Plain(const Attributes&) {}

  Factor operator()(const Call& call, int64_t columns) const {
    const auto x = call.input<float>(0);
    require(!x.shape.empty() && x.last() == columns, "x must have K columns");
    return {.x = x.data, .shape = x.shape};
  }
};

struct Norm {
  static constexpr const char* name = "NormQMatMul";
  static constexpr Port inputs[] = {kFloat, kFloat, kFloat, kUInt8, kHalf, kOptionalFloat, kOptionalFloat};
  static constexpr Port outputs[] = {kFloat, kFloat};
  static constexpr size_t kWeights = 3;

  explicit Norm(const Attributes& attributes) : epsilon(attributes.real("epsilon")) {}

  Factor operator()(const Call& call, int64_t columns) const {
    const auto a = call.input<float>(0), b = call.input<float>(1), norm = call.input<float>(2);
    require(!a.shape.empty() && a.last() == columns && a.shape == b.shape,
            "a and b must have K columns, and the same rows");
    require(norm.shape == Shape{columns}, "norm must be [K]");
    float* const sums = call.output<float>(1, a.shape).data;
    const auto width = static_cast<size_t>(columns);
    return made(call, a, columns, [&](size_t row, float* x) {
      const float *left = a.data + row * width, *right = b.data + row * width;
      float* const added = sums + row * width;
      map(added, width, [&](size_t i, auto read) { return read(left + i) + read(right + i); });
      const float scale = 1 / std::sqrt(sum_of_squares(added, width) / static_cast<float>(columns) + epsilon);
      map(x, width, [&](size_t i, auto read) { return scale * read(added + i) * read(norm.data + i); });
    });
  }

  float epsilon;
};

struct Pair {
  static constexpr const char* name = "PairQMatMul";
  static constexpr Port inputs[] = {kFloat, kFloat, kUInt8, kHalf, kOptionalFloat, kOptionalFloat};
  static constexpr Port outputs[] = {kFloat};
  static constexpr size_t kWeights = 2;

  explicit Pair(const Attributes& attributes)
      : a_factor(attributes.real("a_factor")), b_factor(attributes.real("b_factor")) {}

  Factor operator()(const Call& call, int64_t columns) const {
    const auto a = call.input<float>(0), b = call.input<float>(1);
    require(!a.shape.empty() && !b.shape.empty() && a.rows() == b.rows(), "a and b must have the same rows");
    require(a.last() + b.last() == columns, "a and b must have K columns together");
    const auto left = static_cast<size_t>(a.last()), right = static_cast<size_t>(b.last());
    return made(call, a, columns, [&](size_t row, float* x) {
      map(x, left, [&](size_t i, auto read) { return a_factor * read(a.data + row * left + i); });
      map(x + left, right, [&](size_t i, auto read) { return b_factor * read(b.data + row * right + i); });
    });
  }

  float a_factor, b_factor;
};

struct Silu {
  static constexpr const char* name = "SiluQMatMul";
  static constexpr Port inputs[] = {kFloat, kFloat, kUInt8, kHalf, kOptionalFloat, kOptionalFloat};
  static constexpr Port outputs[] = {kFloat};
  static constexpr size_t kWeights = 2;

  explicit Silu(const Attributes& attributes)
      : a_offset(attributes.integer("a_offset")), gate_offset(attributes.integer("gate_offset")) {
    require(a_offset >= 0 && gate_offset >= 0, "offsets must not be negative");
  }

  Factor operator()(const Call& call, int64_t columns) const {
    const auto a = call.input<float>(0), gate = call.input<float>(1);
    require(!a.shape.empty() && !gate.shape.empty() && a.rows() == gate.rows(), "a and gate must have the same rows");
    require(a_offset + columns <= a.last() && gate_offset + columns <= gate.last(), "columns lie outside the tensor");
    return made(call, a, columns, [&](size_t row, float* x) {
      const float *from = a.data + row * a.last() + a_offset, *by = gate.data + row * gate.last() + gate_offset;
      map(x, static_cast<size_t>(columns), [&](size_t i, auto read) { return read(from + i) * silu(read(by + i)); });
    });
  }

  int64_t a_offset, gate_offset;
};

template <class Before>
class Product {
 public:
  static constexpr const char* name = Before::name;
  static constexpr const auto& inputs = Before::inputs;
  static constexpr const auto& outputs = Before::outputs;

  explicit Product(const Attributes& attributes)
      : before_(attributes),
        columns_(attributes.integer("K")),
        rows_(attributes.integer("N")),
        bits_(attributes.integer("bits")),
        block_size_(attributes.integer("block_size")) {
    const int64_t level = attributes.integer("accuracy_level");
    require(columns_ > 0 && rows_ > 0, "K and N must be positive");
    require(bits_ == 4 || bits_ == 8, "bits must be 4 or 8");
    require(level == 0 || level == kRounded, "accuracy_level must be 0 or 4");
    multiply_ = bits_ == 4 ? of_block<4>(block_size_, level) : of_block<8>(block_size_, level);
  }

  void compute(const Call& call) const {
    Factor factor = before_(call, columns_);
    const auto codes = call.input<uint8_t>(Before::kWeights);
    const auto scales = call.input<Half>(Before::kWeights + 1);
    const auto factors = call.input<float>(Before::kWeights + 2), bias = call.input<float>(Before::kWeights + 3);
    const int64_t blocks = (columns_ + block_size_ - 1) / block_size_, row_bytes = blocks * block_size_ * bits_ / 8;
    require(codes.size() == rows_ * row_bytes && scales.size() == rows_ * blocks,
            "codes and scales must be [N, blocks, ...]");
    require((!factors || factors.size() == rows_) && (!bias || bias.size() == rows_), "factors and bias must be [N]");
    factor.shape.back() = rows_;
    const auto y = call.output<float>(0, factor.shape);
    const Weights weights{
        .codes = codes.data,
        .scales = scales.data,
        .factors = factors.data,
        .bias = bias.data,
        .rows = as_size(rows_),
        .columns = as_size(columns_),
        .blocks = as_size(blocks),
        .row_bytes = as_size(row_bytes),
    };
    multiply_(weights, factor.x, as_size(y.rows()), y.data, call.parallel);
  }

 private:
  Before before_;
  int64_t columns_, rows_, bits_, block_size_;
  Multiply multiply_;
};

template <class Before>
const OrtCustomOp* product_op() {
  static const Op<Product<Before>> op;
  return &op;
}

}  // namespace

const OrtCustomOp* qmatmul_op() { return product_op<Plain>(); }
const OrtCustomOp* norm_qmatmul_op() { return product_op<Norm>(); }
const OrtCustomOp* pair_qmatmul_op() { return product_op<Pair>(); }
const OrtCustomOp* silu_qmatmul_op() { return product_op<Silu>(); }

}  // namespace h1
