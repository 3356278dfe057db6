// CausalConv(x [B, T, W], state [B, taps - 1, C], weight [taps, C], bias [C]?, mask [B, T]?)
//   -> y [B, T, C], new_state [B, taps - 1, C]
//   y[t] = silu(bias + sum_i weight[i] * inputs[t + i]) with inputs = state followed by x[..., offset : +C], zeros
//   where mask is 0. new_state holds the last taps - 1 inputs, oldest first, and may be the memory of state.
#include "elementary.h"
#include "ort.h"

namespace h1 {
namespace {

constexpr size_t kMostTaps = 8;     // Falcon-H1 has 4
constexpr size_t kGrain = 1 << 14;  // elements of one item for a thread: some microseconds

// One sequence; x and y are at their first column.
struct Conv {
  size_t tokens, channels, taps, x_width;
  const float *x, *state, *weight, *bias, *mask;  // bias and mask may be null
  float *y, *new_state;
  const float* zeros;  // [channels]

  // Returns the inputs of one token: first those that the state holds, then the columns of x.
  const float* input(size_t i) const {
    if (i < taps - 1) return state + i * channels;
    const size_t t = i - (taps - 1);
    return mask == nullptr || mask[t] != 0 ? x + t * x_width : zeros;
  }
};

void causal_conv(const Conv& conv, size_t begin, size_t end) {
  for (size_t t = begin; t < end; ++t) {
    const float* window[kMostTaps];
    for (size_t i = 0; i < conv.taps; ++i) window[i] = conv.input(t + i);
    map(conv.y + t * conv.channels, conv.channels, [&](size_t c, auto read) {
      using V = decltype(read(conv.weight + c));
      V sum = conv.bias == nullptr ? V{} : read(conv.bias + c);
      for (size_t i = 0; i < conv.taps; ++i) sum += read(conv.weight + i * conv.channels + c) * read(window[i] + c);
      return silu(sum);
    });
  }
}

// Computes every sequence in turn, its tokens in parallel. new_state may overwrite state, so a copy is read.
void causal_conv(const Parallel& parallel, size_t batch, Conv conv) {
  static thread_local Scratch<float> scratch;
  const size_t rows = conv.taps - 1, size = rows * conv.channels;
  float* zeros = scratch.get(size + conv.channels);
  float* past = zeros + conv.channels;
  std::fill_n(zeros, conv.channels, 0.0f);
  for (size_t b = 0; b < batch; ++b) {
    Conv one = conv;
    std::copy_n(conv.state + b * size, size, past);
    one.state = past;
    one.zeros = zeros;
    one.x += b * conv.tokens * conv.x_width;
    one.y += b * conv.tokens * conv.channels;
    if (conv.mask) one.mask += b * conv.tokens;
    parallel_ranges(parallel, conv.tokens, std::max<size_t>(1, kGrain / conv.channels),
                    [&](size_t begin, size_t end) { causal_conv(one, begin, end); });
    for (size_t i = 0; i < rows; ++i) {
      std::copy_n(one.input(conv.tokens + i), conv.channels, conv.new_state + b * size + i * conv.channels);
    }
  }
}

class CausalConv {
 public:
  static constexpr const char* name = "CausalConv";
  static constexpr Port inputs[] = {floats(3), floats(3), floats(2), optional_floats(1), optional_floats(2)};
  static constexpr Port outputs[] = {floats(3), floats(3)};

  explicit CausalConv(const Attributes& attributes) : offset_(attributes.offset("offset")) {}

  void compute(const Call& call) const {
    const auto x = call.input<float>(0);
    const auto state = call.input<float>(1);
    const auto weight = call.input<float>(2);
    const auto bias = call.input<float>(3);
    const auto mask = call.input<float>(4);
    const Size batch = x.shape[0], tokens = x.shape[1], taps = weight.shape[0], channels = weight.shape[1];
    require(Size{1} <= taps && taps <= Size{kMostTaps}, "weight must have 1 to 8 taps");
    require(channels > Size{0}, "there must be channels");
    require(state.shape == Shape{batch, taps - 1, channels}, "state must be [batch, taps - 1, channels]");
    require(lies_within(x.last(), offset_, channels), "columns lie outside x");
    require(!bias || bias.shape == Shape{channels}, "bias must be [channels]");
    require(!mask || mask.shape == Shape{batch, tokens}, "mask must be [batch, tokens]");
    const auto y = call.output<float>(0, {batch, tokens, channels});
    const auto new_state = call.output<float>(1, state.shape);
    if (y.size() + new_state.size() == Size{0}) return;
    const Conv arguments{
        .tokens = tokens.count(),
        .channels = channels.count(),
        .taps = taps.count(),
        .x_width = x.last().count(),
        .x = x.data == nullptr ? nullptr : x.from(offset_),
        .state = state.data,
        .weight = weight.data,
        .bias = bias.data,
        .mask = mask.data,
        .y = y.data,
        .new_state = new_state.data,
        .zeros = nullptr,
    };
    causal_conv(call.parallel, batch.count(), arguments);
  }

 private:
  Size offset_;
};

}  // namespace

const OrtCustomOp* causal_conv_op() {
  static const Op<CausalConv> op;
  return &op;
}

}  // namespace h1
