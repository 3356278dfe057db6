// h1export::CausalConv: one kernel, with other tiles for a single token. The grid is that of
// plugins/causal_conv/launch.py.
#include "creator.h"
#include "ops.h"

namespace h1 {
namespace {

struct CausalConv {
  using Attributes = causal_conv::Attributes;
  static constexpr char const* kName = causal_conv::kName;
  static constexpr int32_t kStateInput = causal_conv::kStateInput;
  static std::vector<Tensor> inputs() { return {std::begin(causal_conv::kInputs), std::end(causal_conv::kInputs)}; }
  static std::vector<Field> fields() { return causal_conv::fields(); }

  struct Plan {
    causal_conv::Call call;
    Grid grid;
    std::vector<Cubin const*> kernels;
  };

  static bool check(Attributes const&, std::string&) { return true; }

  static bool plan(Sizes const& sizes, DataType dtype, Attributes const&, int32_t architecture, Plan& plan,
                   std::string& why) {
    int64_t const channels = sizes.at("channels"), taps = sizes.at("taps"), tokens = sizes.at("tokens");
    if (sizes.at("kept") != taps - 1 || sizes.at("one") != 1 || channels % static_cast<int64_t>(kAligned) != 0) {
      why = "a state of " + std::to_string(sizes.at("kept")) + " inputs, " + std::to_string(taps) + " taps and " +
            std::to_string(channels) + " channels, which should be a multiple of " + std::to_string(kAligned);
      return false;
    }
    auto const fits = [&](Cubin const& cubin) {
      return cubin.at("TAPS") == taps && (cubin.at("BT") == 1) == (tokens == 1);
    };
    Cubin const* const cubin = find("causal_conv", dtype, architecture, std::to_string(taps) + " taps", fits, why);
    if (cubin == nullptr) return false;
    auto const tiles = [](int64_t count, int64_t tile) { return (count + tile - 1) / tile; };
    plan.kernels = {cubin};
    if (!make_grid({tiles(channels, cubin->at("BC")), tiles(tokens, cubin->at("BT")), sizes.at("batch")}, plan.grid,
                   why)) {
      return false;
    }
    plan.call.T = static_cast<int32_t>(tokens);
    plan.call.channels = static_cast<int32_t>(channels);
    return true;
  }

  static size_t workspace(Sizes const&, DataType) { return 0; }

  static bool enqueue(Plan const& plan, void const* const* inputs, void* const* outputs, Attributes const& attributes,
                      void*, cudaStream_t stream, std::string& why) {
    causal_conv::Call call = plan.call;
    causal_conv::bind(call, inputs, outputs, attributes);
    return launch(*plan.kernels[0], plan.grid, causal_conv::causal_conv_arguments(call), stream, why);
  }
};

}  // namespace

IPluginCreatorInterface* causal_conv_creator() {
  static Creator<CausalConv> creator;
  return &creator;
}

}  // namespace h1
