// SiluMul(a [..., Wa], gate [..., Wg]) -> y [..., width]
//   y = a[..., a_offset : +width] * silu(gate[..., gate_offset : +width]); both may be one tensor, the output of one
//   projection.
#include "ort.h"
#include "simd.h"

namespace h1 {
namespace {

constexpr size_t kGrain = 16384;  // elements of one item for a thread: some microseconds

void silu_mul_row(const float* a, const float* gate, float* y, size_t width) {
  size_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(y + i, load(a + i) * silu(load(gate + i)));
  if (const size_t rest = width - i) store_part(y + i, load_part(a + i, rest) * silu(load_part(gate + i, rest)), rest);
}

class SiluMul {
 public:
  static constexpr const char* name = "SiluMul";
  static constexpr Port inputs[] = {kFloat, kFloat};
  static constexpr Port outputs[] = {kFloat};

  explicit SiluMul(const Attributes& attributes)
      : a_offset_(attributes.integer("a_offset")),
        gate_offset_(attributes.integer("gate_offset")),
        width_(attributes.integer("width")) {
    require(a_offset_ >= 0 && gate_offset_ >= 0 && width_ > 0, "offsets and width must be positive");
  }

  void compute(const Call& call) const {
    const auto a = call.input<float>(0), gate = call.input<float>(1);
    require(a.rows() == gate.rows(), "a and gate must have the same rows");
    require(a_offset_ + width_ <= a.last() && gate_offset_ + width_ <= gate.last(), "columns lie outside the tensor");
    Shape shape = a.shape;
    shape.back() = width_;
    const auto y = call.output<float>(0, shape);
    parallel_ranges(call.parallel, a.rows(), std::max<size_t>(1, kGrain / width_), [&](size_t begin, size_t end) {
      for (size_t row = begin; row < end; ++row) {
        silu_mul_row(a.data + row * a.last() + a_offset_, gate.data + row * gate.last() + gate_offset_,
                     y.data + row * width_, width_);
      }
    });
  }

 private:
  int64_t a_offset_, gate_offset_, width_;
};

}  // namespace

const OrtCustomOp* silu_mul_op() {
  static const Op<SiluMul> op;
  return &op;
}

}  // namespace h1
