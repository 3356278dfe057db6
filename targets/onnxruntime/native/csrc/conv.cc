// CausalConv(x [B, T, W], state [B, taps - 1, C], weight [taps, C], bias [C]?, mask [B, T]?) -> y [B, T, C], new_state [B, taps - 1, C]
//   y[t] = silu(bias + sum_i weight[i] * inputs[t + i]) with inputs = state followed by x[..., offset : +C], zeros where mask is 0.
//   new_state holds the last taps - 1 inputs, oldest first, and may be the memory of state.
#include "ort.h"
#include "simd.h"

namespace h1 {
namespace {

constexpr size_t kBlock = 128;         // channels of one item for a thread: what it touches stays in the L1 cache
constexpr size_t kMostTaps = 8;        // Falcon-H1 has 4
constexpr size_t kSerial = 1 << 13;    // elements that one thread has done before another has started
constexpr float kZeros[kBlock] = {};

struct Conv {
  size_t tokens, channels, taps, x_width;
};

// `width` channels of one sequence; pointers are at the first of them.
void causal_conv_block(const Conv& conv, size_t width, const float* x, const float* state, const float* weight, const float* bias,
                       const float* mask, float* y, float* new_state) {
  const size_t before = conv.taps - 1, rest = width % kLanes, whole = width - rest;
  float past[kMostTaps][kBlock];  // a copy, because new_state may overwrite state
  for (size_t i = 0; i < before; ++i) std::copy_n(state + i * conv.channels, width, past[i]);
  const auto input = [&](size_t i) {
    if (i < before) return static_cast<const float*>(past[i]);
    return mask == nullptr || mask[i - before] != 0 ? x + (i - before) * conv.x_width : kZeros;
  };
  for (size_t t = 0; t < conv.tokens; ++t) {
    const float* window[kMostTaps];
    for (size_t i = 0; i < conv.taps; ++i) window[i] = input(t + i);
    const auto convolve = [&](size_t c, auto read) {
      f32x8 total = bias == nullptr ? f32x8{} : read(bias + c);
      for (size_t i = 0; i < conv.taps; ++i) total += read(weight + i * conv.channels + c) * read(window[i] + c);
      return silu(total);
    };
    float* out = y + t * conv.channels;
    for (size_t c = 0; c < whole; c += kLanes) store(out + c, convolve(c, [](const float* p) { return load(p); }));
    if (rest) store_part(out + whole, convolve(whole, [rest](const float* p) { return load_part(p, rest); }), rest);
  }
  for (size_t i = 0; i < before; ++i) std::copy_n(input(conv.tokens + i), width, new_state + i * conv.channels);
}

void causal_conv(const Parallel& parallel, const Conv& conv, size_t batch, const float* x, const float* state, const float* weight,
                 const float* bias, const float* mask, float* y, float* new_state) {
  const size_t blocks = (conv.channels + kBlock - 1) / kBlock, states = (conv.taps - 1) * conv.channels;
  const auto block = [&](size_t item) {
    const size_t b = item / blocks, c = item % blocks * kBlock;
    causal_conv_block(conv, std::min(kBlock, conv.channels - c), x + b * conv.tokens * conv.x_width + c, state + b * states + c, weight + c,
                      bias ? bias + c : nullptr, mask ? mask + b * conv.tokens : nullptr, y + b * conv.tokens * conv.channels + c,
                      new_state + b * states + c);
  };
  if (batch * conv.tokens * conv.channels > kSerial) return parallel(batch * blocks, block);
  for (size_t item = 0; item < batch * blocks; ++item) block(item);
}

class CausalConv {
 public:
  static constexpr const char* name = "CausalConv";
  static constexpr Port inputs[] = {kFloat, kFloat, kFloat, kOptionalFloat, kOptionalFloat};
  static constexpr Port outputs[] = {kFloat, kFloat};

  explicit CausalConv(const Attributes& attributes) : offset_(attributes.integer("offset")) {
    require(offset_ >= 0, "offset must not be negative");
  }

  void compute(const Call& call) const {
    const auto x = call.input<float>(0), state = call.input<float>(1), weight = call.input<float>(2);
    const auto bias = call.input<float>(3), mask = call.input<float>(4);
    require(x.shape.size() == 3 && state.shape.size() == 3 && weight.shape.size() == 2, "x and state have three dimensions, weight two");
    const int64_t batch = x.shape[0], tokens = x.shape[1], taps = weight.shape[0], channels = weight.shape[1];
    require(0 < taps && taps <= int64_t(kMostTaps), "weight has 1 to 8 taps");
    require(state.shape == Shape{batch, taps - 1, channels}, "state must be [batch, taps - 1, channels]");
    require(offset_ + channels <= x.last(), "columns lie outside x");
    require(!bias || bias.shape == Shape{channels}, "bias must be [channels]");
    require(!mask || mask.shape == Shape{batch, tokens}, "mask must be [batch, tokens]");
    const auto y = call.output<float>(0, {batch, tokens, channels});
    const auto new_state = call.output<float>(1, state.shape);
    const Conv conv{size_t(tokens), size_t(channels), size_t(taps), size_t(x.last())};
    causal_conv(call.parallel, conv, batch, x.data + offset_, state.data, weight.data, bias.data, mask.data, y.data, new_state.data);
  }

 private:
  int64_t offset_;
};

}  // namespace

const OrtCustomOp* causal_conv_op() {
  static const Op<CausalConv> op;
  return &op;
}

}  // namespace h1
