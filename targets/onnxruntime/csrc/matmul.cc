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

#include "elementary.h"
#include "matmul_float.h"
#include "matmul_rounded.h"
#include "ort.h"
#include "simd.h"

namespace h1 {
namespace {

constexpr int64_t kRounded = 4;   // the accuracy level
constexpr size_t kGrain = 16384;  // elements of x that a thread makes at a time: some microseconds

using Multiply = void (*)(const Weights&, const float*, Tokens, float*, const Parallel&);

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
Factor made(const Call& call, const Tensor<const float>& like, Size columns, const Make& make) {
  static thread_local Scratch<float> memory;
  const size_t width = columns.count(), rows = like.rows().count();
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
  static constexpr Port inputs[] = {floats(), bytes(3), halves(2), optional_floats(1), optional_floats(1)};
  static constexpr Port outputs[] = {floats()};
  static constexpr size_t kWeights = 1;  // the input where W... begins

  explicit Plain(const Attributes&) {}

  Factor operator()(const Call& call, Size columns) const {
    const auto x = call.input<float>(0);
    require(x.last() == columns, "x must have K columns");
    return {.x = x.data, .shape = x.shape};
  }
};

struct Norm {
  static constexpr const char* name = "NormQMatMul";
  static constexpr Port inputs[] = {floats(),  floats(),           floats(1),         bytes(3),
                                    halves(2), optional_floats(1), optional_floats(1)};
  static constexpr Port outputs[] = {floats(), floats()};
  static constexpr size_t kWeights = 3;

  explicit Norm(const Attributes& attributes) : epsilon(attributes.finite("epsilon")) {
    require(epsilon >= 0, "epsilon must not be negative");
  }

  Factor operator()(const Call& call, Size columns) const {
    const auto a = call.input<float>(0), b = call.input<float>(1), norm = call.input<float>(2);
    require(a.last() == columns && a.shape == b.shape, "a and b must have K columns, and the same rows");
    require(norm.shape == Shape{columns}, "norm must be [K]");
    float* const sums = call.output<float>(1, a.shape).data;
    const size_t width = columns.count();
    return made(call, a, columns, [&](size_t row, float* x) {
      const float *left = a.data + row * width, *right = b.data + row * width;
      float* const added = sums + row * width;
      map(added, width, [&](size_t i, auto read) { return read(left + i) + read(right + i); });
      const float scale = 1 / std::sqrt(sum_of_squares(added, width) / static_cast<float>(width) + epsilon);
      map(x, width, [&](size_t i, auto read) { return scale * read(added + i) * read(norm.data + i); });
    });
  }

  float epsilon;
};

struct Pair {
  static constexpr const char* name = "PairQMatMul";
  static constexpr Port inputs[] = {floats(), floats(), bytes(3), halves(2), optional_floats(1), optional_floats(1)};
  static constexpr Port outputs[] = {floats()};
  static constexpr size_t kWeights = 2;

  explicit Pair(const Attributes& attributes)
      : a_factor(attributes.finite("a_factor")), b_factor(attributes.finite("b_factor")) {}

  Factor operator()(const Call& call, Size columns) const {
    const auto a = call.input<float>(0), b = call.input<float>(1);
    require(a.rows() == b.rows(), "a and b must have the same rows");
    require(a.last() > Size{0} && b.last() > Size{0} && a.last() + b.last() == columns,
            "a and b must have K columns together");
    const size_t left = a.last().count(), right = b.last().count();
    return made(call, a, columns, [&](size_t row, float* x) {
      map(x, left, [&](size_t i, auto read) { return a_factor * read(a.data + row * left + i); });
      map(x + left, right, [&](size_t i, auto read) { return b_factor * read(b.data + row * right + i); });
    });
  }

  float a_factor, b_factor;
};

struct Silu {
  static constexpr const char* name = "SiluQMatMul";
  static constexpr Port inputs[] = {floats(), floats(), bytes(3), halves(2), optional_floats(1), optional_floats(1)};
  static constexpr Port outputs[] = {floats()};
  static constexpr size_t kWeights = 2;

  explicit Silu(const Attributes& attributes)
      : a_offset(attributes.offset("a_offset")), gate_offset(attributes.offset("gate_offset")) {}

  Factor operator()(const Call& call, Size columns) const {
    const auto a = call.input<float>(0), gate = call.input<float>(1);
    require(a.rows() == gate.rows(), "a and gate must have the same rows");
    require(lies_within(a.last(), a_offset, columns) && lies_within(gate.last(), gate_offset, columns),
            "columns lie outside the tensor");
    const size_t a_width = a.last().count(), gate_width = gate.last().count();
    return made(call, a, columns, [&](size_t row, float* x) {
      const float *from = a.from(a_offset) + row * a_width, *by = gate.from(gate_offset) + row * gate_width;
      map(x, columns.count(), [&](size_t i, auto read) { return read(from + i) * silu(read(by + i)); });
    });
  }

  Size a_offset, gate_offset;
};

template <class Before>
class Product {
 public:
  static constexpr const char* name = Before::name;
  static constexpr const auto& inputs = Before::inputs;
  static constexpr const auto& outputs = Before::outputs;

  explicit Product(const Attributes& attributes)
      : before_(attributes),
        columns_(attributes.size("K")),
        rows_(attributes.size("N")),
        bits_(attributes.integer("bits")),
        block_size_(attributes.integer("block_size")) {
    const int64_t level = attributes.integer("accuracy_level");
    require(bits_ == 4 || bits_ == 8, "bits must be 4 or 8");
    require(level == 0 || level == kRounded, "accuracy_level must be 0 or 4");
    multiply_ = bits_ == 4 ? of_block<4>(block_size_, level) : of_block<8>(block_size_, level);
  }

  void compute(const Call& call) const {
    Factor factor = before_(call, columns_);
    const auto codes = call.input<uint8_t>(Before::kWeights);
    const auto scales = call.input<Half>(Before::kWeights + 1);
    const auto factors = call.input<float>(Before::kWeights + 2), bias = call.input<float>(Before::kWeights + 3);
    const Size blocks = ceil_div(columns_, block_size_), block_bytes = block_size_ * bits_ / 8;
    require(codes.shape == Shape{rows_, blocks, block_bytes} && scales.shape == Shape{rows_, blocks},
            "codes and scales must be [N, blocks, bytes of a block] and [N, blocks]");
    require((!factors || factors.shape == Shape{rows_}) && (!bias || bias.shape == Shape{rows_}),
            "factors and bias must be [N]");
    factor.shape.back() = rows_;
    const bool apart = factor.shape.rank() > 1 && factor.shape[factor.shape.rank() - 2] == Size{1};
    const auto y = call.output<float>(0, factor.shape);
    const Weights weights{
        .codes = codes.data,
        .scales = scales.data,
        .factors = factors.data,
        .bias = bias.data,
        .rows = rows_.count(),
        .columns = columns_.count(),
        .blocks = blocks.count(),
        .row_bytes = (blocks * block_bytes).count(),
    };
    multiply_(weights, factor.x, {.count = y.rows().count(), .apart = apart}, y.data, call.parallel);
  }

 private:
  Before before_;
  Size columns_, rows_;
  int64_t bits_, block_size_;
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
