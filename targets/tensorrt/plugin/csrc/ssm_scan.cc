// h1export::SSMScan: three kernels for many tokens, one for a single token. Grids and workspace are those of
// plugins/ssm_scan/launch.py.
#include "creator.h"
#include "ops.h"

namespace h1 {
namespace {

constexpr size_t kAlignment = 256;  // bytes, of each part of the workspace

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct SsmScan {
  using Attributes = ssm_scan::Attributes;
  static constexpr char const* kName = ssm_scan::kName;
  static constexpr int32_t kStateInput = ssm_scan::kStateInput;
  static std::vector<Tensor> inputs() { return {std::begin(ssm_scan::kInputs), std::end(ssm_scan::kInputs)}; }
  static std::vector<Field> fields() { return ssm_scan::fields(); }

  struct Plan {
    ssm_scan::Call call;
    int64_t rows, state, chunks;        // batch * heads; d_head * d_state
    std::vector<Cubin const*> kernels;  // decode; or chunk_state, state_passing, chunk_scan
    std::vector<Grid> grids;            // of each
    bool decode() const { return kernels.size() == 1; }
  };

  static bool check(Attributes const& attributes, std::string& why) {
    // NaN is refused too
    if (attributes.dt_min >= 0 && attributes.dt_min <= attributes.dt_max) return true;
    why = "attributes dt_min and dt_max are " + std::to_string(attributes.dt_min) + " and " +
          std::to_string(attributes.dt_max);
    return false;
  }

  static bool plan(Sizes const& sizes, DataType dtype, Attributes const&, int32_t architecture, Plan& plan,
                   std::string& why) {
    int32_t const heads = static_cast<int32_t>(sizes.at("heads")), groups = static_cast<int32_t>(sizes.at("groups"));
    if (groups < 1 || heads % groups != 0) {
      why = std::to_string(heads) + " heads cannot share " + std::to_string(groups) + " groups";
      return false;
    }
    plan.kernels.clear();
    bool const one = sizes.at("tokens") == 1;
    for (char const* kernel : one ? std::vector{"decode"} : std::vector{"chunk_state", "state_passing", "chunk_scan"}) {
      Cubin const* const cubin = kernel_for(kernel, sizes, dtype, architecture, why);
      if (cubin == nullptr) return false;
      plan.kernels.push_back(cubin);
    }
    plan.rows = product({sizes.at("batch"), heads});
    plan.state = product({sizes.at("d_head"), sizes.at("d_state")});
    plan.chunks = one ? 0 : chunks(sizes, *plan.kernels[0]);
    plan.grids.clear();
    for (std::array<int64_t, 3> const& programs : grids(plan)) {
      plan.grids.emplace_back();
      if (!make_grid(programs, plan.grids.back(), why)) return false;
    }
    plan.call.T = static_cast<int32_t>(sizes.at("tokens"));
    plan.call.H = heads;
    plan.call.G = groups;
    plan.call.chunks = static_cast<int32_t>(plan.chunks);
    return true;
  }

  static size_t workspace(Sizes const& sizes, DataType dtype) {
    std::string why;
    Cubin const* const cubin = kernel_for("chunk_state", sizes, dtype, 0, why);
    if (cubin == nullptr || sizes.at("tokens") == 1) return 0;
    int64_t const rows = product({sizes.at("batch"), sizes.at("heads"), chunks(sizes, *cubin)});
    int64_t const state = product({sizes.at("d_head"), sizes.at("d_state")});
    // twice the largest part; `plan` refuses every size for which it is too large
    if (product({rows, state, 2 * sizeof(float)}) == kMostBytes) return 0;
    return aligned(rows * state * sizeof(float)) + aligned(rows * sizeof(float)) +
           aligned(rows * state * sizeof(uint16_t));
  }

  static bool enqueue(Plan const& plan, void const* const* inputs, void* const* outputs, Attributes const& attributes,
                      void* workspace, cudaStream_t stream, std::string& why) {
    ssm_scan::Call call = plan.call;
    ssm_scan::bind(call, inputs, outputs, attributes);
    auto const& grids = plan.grids;
    if (plan.decode()) return launch(*plan.kernels[0], grids[0], ssm_scan::decode_arguments(call), stream, why);
    Cubin const &state = *plan.kernels[0], &passing = *plan.kernels[1], &scan = *plan.kernels[2];
    char* const local = static_cast<char*>(workspace);
    size_t const entering = plan.rows * plan.chunks;
    call.local = local;
    call.total = local + aligned(entering * plan.state * sizeof(float));
    call.entry = static_cast<char const*>(call.total) + aligned(entering * sizeof(float));
    return launch(state, grids[0], ssm_scan::chunk_state_arguments(call), stream, why) &&
           launch(passing, grids[1], ssm_scan::state_passing_arguments(call), stream, why) &&
           launch(scan, grids[2], ssm_scan::chunk_scan_arguments(call), stream, why);
  }

 private:
  static std::vector<std::array<int64_t, 3>> grids(Plan const& plan) {
    if (plan.decode()) {
      Cubin const& decode = *plan.kernels[0];
      return {{decode.at("P") / decode.at("BP"), plan.rows, 1}};
    }
    Cubin const &state = *plan.kernels[0], &passing = *plan.kernels[1], &scan = *plan.kernels[2];
    int64_t const state_tiles = state.at("P") / state.at("BP") * (state.at("N") / state.at("BN"));
    int64_t const scan_tiles = scan.at("Q") / scan.at("BT") * (scan.at("P") / scan.at("BP"));
    return {{state_tiles, plan.chunks, plan.rows},
            {plan.state / passing.at("BS"), plan.rows, 1},
            {scan_tiles, plan.chunks, plan.rows}};
  }

  static int64_t chunks(Sizes const& sizes, Cubin const& cubin) {
    return (sizes.at("tokens") + cubin.at("Q") - 1) / cubin.at("Q");
  }

  static Cubin const* kernel_for(char const* kernel, Sizes const& sizes, DataType dtype, int32_t architecture,
                                 std::string& why) {
    int64_t const d_head = sizes.at("d_head"), d_state = sizes.at("d_state");
    std::string const shape = "head dim " + std::to_string(d_head) + " and state size " + std::to_string(d_state);
    auto const fits = [&](Cubin const& cubin) { return cubin.at("P") == d_head && cubin.at("N") == d_state; };
    return find(kernel, dtype, architecture, shape, fits, why);
  }
};

}  // namespace

IPluginCreatorInterface* ssm_scan_creator() {
  static Creator<SsmScan> creator;
  return &creator;
}

}  // namespace h1
