// SiluMul(a [..., Wa], gate [..., Wg]) -> y [..., width]
//   y = a[..., a_offset : +width] * silu(gate[..., gate_offset : +width]); both may be one tensor, the output of one
//   projection.
#include "elementary.h"
#include "ort.h"

namespace h1 {
namespace {

constexpr size_t kGrain = 16384;  // elements of one item for a thread: some microseconds

class SiluMul {
 public:
  static constexpr const char* name = "SiluMul";
  static constexpr Port inputs[] = {floats(), floats()};
  static constexpr Port outputs[] = {floats()};

  explicit SiluMul(const Attributes& attributes)
      : a_offset_(attributes.offset("a_offset")),
        gate_offset_(attributes.offset("gate_offset")),
        width_(attributes.size("width")) {}

  void compute(const Call& call) const {
    const auto a = call.input<float>(0), gate = call.input<float>(1);
    require(a.rows() == gate.rows(), "a and gate must have the same rows");
    require(lies_within(a.last(), a_offset_, width_) && lies_within(gate.last(), gate_offset_, width_),
            "columns lie outside the tensor");
    Shape shape = a.shape;
    shape.back() = width_;
    const auto y = call.output<float>(0, shape);
    const size_t rows = a.rows().count(), width = width_.count();
    const size_t a_width = a.last().count(), gate_width = gate.last().count();
    if (rows == 0) return;
    const float *left = a.from(a_offset_), *right = gate.from(gate_offset_);
    parallel_ranges(call.parallel, rows, std::max<size_t>(1, kGrain / width), [&](size_t begin, size_t end) {
      for (size_t row = begin; row < end; ++row) {
        const float *of_a = left + row * a_width, *of_gate = right + row * gate_width;
        map(y.data + row * width, width, [=](size_t i, auto read) { return read(of_a + i) * silu(read(of_gate + i)); });
      }
    });
  }

 private:
  Size a_offset_, gate_offset_, width_;
};

}  // namespace

const OrtCustomOp* silu_mul_op() {
  static const Op<SiluMul> op;
  return &op;
}

}  // namespace h1
