// Does to the plugin library what TensorRT does, one case a line of stdin, and prints what comes of it. Tensor i of a case is at 4096 * (i + 1).
//   OP GPU REFUSED IN_PLACE TAMPER  FIELDS (NAME i|f|l VALUE)*  INPUTS (h|b|f|d RANK SIZE*)*
// GPU: an architecture, or 0 for a machine without a driver; l: an attribute of two values; d: int64, which nothing takes.
#include <dlfcn.h>

#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "NvInferRuntime.h"

using namespace nvinfer1;

namespace {

struct Logger : ILogger {
  void log(Severity severity, AsciiChar const* text) noexcept override { std::printf("log %d %s\n", static_cast<int>(severity), text); }
};
struct Finder : ILoggerFinder {
  Logger logger;
  ILogger* findLogger() override { return &logger; }
};
struct Builder : IExprBuilder {};

struct Case {
  std::string op;
  int gpu = 0, refused = 0, in_place = 0, tamper = 0;
  std::vector<std::string> names;
  std::vector<int32_t> ints;
  std::vector<float> floats;
  std::vector<PluginField> fields;
  std::vector<PluginTensorDesc> inputs;
};

Case parse(std::string const& line) {
  Case c;
  std::istringstream in(line);
  size_t fields = 0, inputs = 0;
  in >> c.op >> c.gpu >> c.refused >> c.in_place >> c.tamper >> fields;
  c.names.resize(fields), c.ints.resize(2 * fields + 2), c.floats.resize(fields);
  for (size_t i = 0; i < fields; ++i) {
    std::string kind, value;
    in >> c.names[i] >> kind >> value;
    c.ints[i] = c.floats[i] = 0;
    if (kind == "f") c.floats[i] = std::stof(value);
    else c.ints[i] = std::stoi(value);
    void const* const data = kind == "f" ? static_cast<void const*>(&c.floats[i]) : &c.ints[i];
    c.fields.emplace_back(c.names[i].c_str(), data, kind == "f" ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, kind == "l" ? 2 : 1);
  }
  in >> inputs;
  for (size_t i = 0; i < inputs; ++i) {
    char type = 0;
    PluginTensorDesc desc{};
    in >> type >> desc.dims.nbDims;
    for (int32_t d = 0; d < desc.dims.nbDims; ++d) in >> desc.dims.d[d];
    desc.type = type == 'h' ? DataType::kHALF : type == 'b' ? DataType::kBF16 : type == 'f' ? DataType::kFLOAT : DataType::kINT64;
    desc.format = TensorFormat::kLINEAR;
    c.inputs.push_back(desc);
  }
  return c;
}

template <class Capability>
Capability* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

// A network's layer: from attributes to what an engine would hold.
IPluginV3* build(IPluginCreatorV3One* creator, Case const& c) {
  PluginFieldCollection const given{static_cast<int32_t>(c.fields.size()), c.fields.data()};
  IPluginV3* const made = creator->createPlugin("layer", &given, TensorRTPhase::kBUILD);
  if (made == nullptr) return nullptr;
  IPluginV3* const plugin = made->clone();
  auto* const step = capability<IPluginV3OneBuildV2>(plugin, PluginCapabilityType::kBUILD);
  int32_t const n = static_cast<int32_t>(c.inputs.size());
  DataType types[2];
  std::vector<DataType> in_types;
  std::vector<DimsExprs> in_shapes(n);
  std::vector<DynamicPluginTensorDesc> io;
  for (PluginTensorDesc const& desc : c.inputs) {
    in_types.push_back(desc.type);
    io.push_back({desc, desc.dims, desc.dims, desc.dims});
    in_shapes[io.size() - 1].nbDims = static_cast<int32_t>(io.size());  // a mark, to see where it goes
  }
  if (step->getOutputDataTypes(types, 2, in_types.data(), n) != 0) return nullptr;
  DimsExprs shapes[2];
  Builder builder;
  if (step->getOutputShapes(in_shapes.data(), n, nullptr, 0, shapes, 2, builder) != 0) return nullptr;
  for (DataType type : types) {
    io.push_back({});
    io.back().desc.type = type, io.back().desc.format = TensorFormat::kLINEAR;
  }
  for (int32_t at = 0; at < n + 2; ++at) {
    if (!step->supportsFormatCombination(at, io.data(), n, 2)) return std::printf("format %d\n", at), nullptr;
  }
  if (step->configurePlugin(io.data(), n, io.data() + n, 2) != 0) return nullptr;
  std::printf("built %d %d %d %zu\n", step->getAliasedInput(1), shapes[0].nbDims - 1, shapes[1].nbDims - 1,
              step->getWorkspaceSize(io.data(), n, io.data() + n, 2));
  return plugin;
}

void run(IPluginCreatorV3One* creator, Case const& c) {
  IPluginV3* const plugin = build(creator, c);
  if (plugin == nullptr) return;
  auto const* const stored = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  std::vector<PluginField> fields(stored->fields, stored->fields + stored->nbFields);
  if (c.tamper) fields.back().data = "00000000000000000000000000000000";
  PluginFieldCollection const engine{stored->nbFields, fields.data()};
  IPluginV3* const loaded = creator->createPlugin("layer", &engine, TensorRTPhase::kRUNTIME);
  if (loaded == nullptr) return;
  IPluginV3* const attached = capability<IPluginV3OneRuntime>(loaded, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
  auto* const step = capability<IPluginV3OneRuntime>(attached, PluginCapabilityType::kRUNTIME);
  int32_t const n = static_cast<int32_t>(c.inputs.size());
  std::vector<void const*> inputs;
  for (int32_t i = 0; i < n; ++i) inputs.push_back(reinterpret_cast<void*>(4096LL * (i + 1)));
  PluginTensorDesc outputs[2]{};
  int32_t const alias = c.op == "SSMScan" ? 7 : 1;
  void* results[] = {reinterpret_cast<void*>(4096LL * (n + 1)),
                     c.in_place == 1 ? const_cast<void*>(inputs[alias]) : reinterpret_cast<void*>(4096LL * (n + 2))};
  if (step->onShapeChange(c.inputs.data(), n, outputs, 2) != 0) return;
  void* const workspace = reinterpret_cast<void*>(4096LL * (n + 3));
  std::printf("enqueued %d\n", step->enqueue(c.inputs.data(), outputs, inputs.data(), results, workspace, reinterpret_cast<cudaStream_t>(77)));
}

}  // namespace

int main(int, char** arguments) {
  void* const library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) return std::printf("%s\n", dlerror()), 1;
  void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
  auto const creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  Finder finder;
  reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* const all = creators(count);
  for (std::string line; std::getline(std::cin, line);) {
    Case const c = parse(line);
    std::printf("case\n");
    if (driver != nullptr) reinterpret_cast<void (*)(int, int)>(dlsym(driver, "fake_gpu"))(c.gpu, c.refused);
    for (int32_t i = 0; i < count; ++i) {
      auto* const creator = static_cast<IPluginCreatorV3One*>(all[i]);
      if (c.op == creator->getPluginName()) run(creator, c);
    }
  }
  return 0;
}
