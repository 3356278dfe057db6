// An h1 op as a TensorRT plugin. What ops differ in is in Op; see ssm_scan.cc.
//
// Op has: Attributes, Plan (what an enqueue needs), kName, inputs(), fields(), kStateInput;
//   bool plan(Sizes, DataType, Attributes, architecture, Plan&, why)
//     finds kernels for the sizes; architecture 0: of any GPU
//   size_t workspace(Sizes, DataType)
//     returns bytes
//   bool enqueue(Plan, inputs, outputs, Attributes, workspace, stream, why)
#pragma once

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cubins.h"
#include "driver.h"
#include "log.h"
#include "ops.h"
#include "sizes.h"

namespace h1 {

using namespace nvinfer1;

constexpr char const* kNamespace = "h1export";
constexpr char const* kVersion = "1";
constexpr char const* kInPlace = "state_in_place";  // 1: output 1 is the memory of the state; 0: it has its own
constexpr char const* kBuiltBy = "library";         // in an engine: kLibrary of the plugin that it was built with
constexpr int32_t kOutputs = 2, kFailed = -1;

template <class Op>
class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuildV2, public IPluginV3OneRuntime {
 public:
  Plugin(typename Op::Attributes const& attributes, int32_t in_place) : attributes_(attributes), in_place_(in_place) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuildV2*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return new Plugin(attributes_, in_place_); }
  char const* getPluginName() const noexcept override { return Op::kName; }
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return kOutputs; }
  int32_t getAliasedInput(int32_t output) noexcept override {
    return in_place_ != 0 && output == 1 ? Op::kStateInput : -1;
  }

  int32_t getOutputDataTypes(DataType* outputs, int32_t wanted, DataType const* inputs,
                             int32_t count) const noexcept override {
    if (!counted(count) || wanted != kOutputs) return kFailed;
    outputs[0] = inputs[0];
    outputs[1] = inputs[Op::kStateInput];
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* outputs,
                          int32_t wanted, IExprBuilder&) noexcept override {
    if (!counted(count) || wanted != kOutputs) return kFailed;
    outputs[0] = inputs[0];
    outputs[1] = inputs[Op::kStateInput];
    return 0;
  }

  bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* io, int32_t inputs,
                                 int32_t) noexcept override {
    if (inputs != count() || at < 0 || at >= inputs + kOutputs || io[at].desc.format != TensorFormat::kLINEAR)
      return false;
    DataType const own = io[0].desc.type, type = io[at].desc.type;
    if (at == 0) return own == DataType::kHALF || own == DataType::kBF16;
    int32_t const input = at < inputs ? at : at == inputs ? 0 : Op::kStateInput;
    return type == (Op::inputs()[input].own ? own : DataType::kFLOAT);
  }

  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t count, DynamicPluginTensorDesc const*,
                          int32_t) noexcept override {
    std::string why;
    if (!counted(count)) return kFailed;
    Sizes sizes;
    for (int32_t i = 0; i < count; ++i) {
      if (!sizes.add(Op::inputs()[i], in[i].desc.dims, why)) return failed(why);
    }
    Sizes most;
    if (!largest(in, most, why)) return failed(why);
    typename Op::Plan plan;
    return Op::plan(most, in[0].desc.type, attributes_, 0, plan, why) ? 0 : failed(why);
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t count, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    Sizes most;
    std::string why;
    return counted(count) && largest(in, most, why) ? Op::workspace(most, in[0].desc.type) : 0;
  }

  int32_t onShapeChange(PluginTensorDesc const* in, int32_t count, PluginTensorDesc const*, int32_t) noexcept override {
    std::string why;
    if (!counted(count)) return kFailed;
    return prepare(in, why) ? 0 : failed(why);
  }

  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override {
    std::string why;
    if (!plan_ && !prepare(in, why)) return failed(why);
    if (!usable(inputs, outputs, workspace, why)) return failed(why);
    if (in_place_ != 0 && outputs[1] != inputs[Op::kStateInput]) {
      return failed("the state and its output are not one memory");
    }
    return Op::enqueue(*plan_, inputs, outputs, attributes_, workspace, stream, why) ? 0 : failed(why);
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    serialized_.clear();
    for (Field const& field : Op::fields()) {
      serialized_.emplace_back(field.name, reinterpret_cast<char const*>(&attributes_) + field.offset, field.type, 1);
    }
    serialized_.emplace_back(kInPlace, &in_place_, PluginFieldType::kINT32, 1);
    serialized_.emplace_back(kBuiltBy, kLibrary, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(kLibrary)));
    collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
    return &collection_;
  }

 private:
  static int32_t count() {
    static int32_t const inputs = static_cast<int32_t>(Op::inputs().size());
    return inputs;
  }
  static int32_t failed(std::string const& why) { return fail(Op::kName, why) ? 0 : kFailed; }
  static bool counted(int32_t inputs) {
    return inputs == count() ||
           fail(Op::kName, std::to_string(inputs) + " inputs, and should be " + std::to_string(count()));
  }

  static bool largest(DynamicPluginTensorDesc const* in, Sizes& most, std::string& why) {
    for (int32_t i = 0; i < count(); ++i) {
      if (!most.add_known(Op::inputs()[i], in[i].max, why)) return false;
    }
    return true;
  }

  // Whether every input has the dtype that the kernels read it in.
  static bool typed(PluginTensorDesc const* in, std::string& why) {
    DataType const own = in[0].type;
    bool const half = own == DataType::kHALF || own == DataType::kBF16;
    for (int32_t i = 0; i < count(); ++i) {
      Tensor const tensor = Op::inputs()[i];
      if (i == 0 ? half : in[i].type == (tensor.own ? own : DataType::kFLOAT)) continue;
      why = std::string("input ") + tensor.name + " has another dtype than " +
            (i == 0       ? "fp16 or bf16"
             : tensor.own ? "x, and should have the same"
                          : "float32");
      return false;
    }
    return true;
  }

  // Whether the kernels can read and write at the addresses; they were compiled for aligned ones.
  bool usable(void const* const* inputs, void* const* outputs, void* workspace, std::string& why) const {
    auto const fits = [](void const* address) {
      return address != nullptr && reinterpret_cast<uintptr_t>(address) % kAligned == 0;
    };
    auto const refuse = [&why](std::string const& what, void const* address) {
      why = what +
            (address == nullptr ? " has no memory" : " is not at a multiple of " + std::to_string(kAligned) + " bytes");
      return false;
    };
    for (int32_t i = 0; i < count(); ++i) {
      if (!fits(inputs[i])) return refuse(std::string("input ") + Op::inputs()[i].name, inputs[i]);
    }
    for (int32_t i = 0; i < kOutputs; ++i) {
      if (!fits(outputs[i])) return refuse("output " + std::to_string(i), outputs[i]);
    }
    return workspace_ == 0 || fits(workspace) || refuse("the workspace", workspace);
  }

  // Plans the calls on inputs of these shapes and dtypes. After a failure there is no plan, not even an earlier one.
  bool prepare(PluginTensorDesc const* in, std::string& why) {
    plan_.reset();
    Sizes sizes;
    for (int32_t i = 0; i < count(); ++i) {
      if (!sizes.add_known(Op::inputs()[i], in[i].dims, why)) return false;
    }
    if (!typed(in, why)) return false;
    int32_t const architecture = gpu_architecture(why);
    typename Op::Plan plan;
    if (architecture == 0 || !Op::plan(sizes, in[0].type, attributes_, architecture, plan, why)) return false;
    for (Cubin const* kernel : plan.kernels) {
      if (!load(*kernel, why)) return false;
    }
    plan_ = plan;
    workspace_ = Op::workspace(sizes, in[0].type);
    return true;
  }

  typename Op::Attributes attributes_;
  int32_t in_place_;
  std::optional<typename Op::Plan> plan_;
  size_t workspace_ = 0;  // bytes that the planned calls need
  std::vector<PluginField> serialized_;
  PluginFieldCollection collection_{};
};

}  // namespace h1
