// Does to the plugin library what TensorRT does, one case a line of stdin, and prints what comes of it.
//   OP GPU REFUSED IN_PLACE TAMPER BROKEN DATA  FIELDS (NAME i|f|l VALUE)*  INPUTS (h|b|f|d RANK SIZE*)*  CALLED (h|b|f|d RANK SIZE*)*
// GPU, REFUSED: what a stand-in for the driver is to be; a real driver stays what it is.
// BROKEN: "-", or PLACE:null or PLACE:odd for what is wrong with an address; places are the inputs, the outputs, the workspace.
// DATA: "-", or a folder with 0.bin, 1.bin, ... of the inputs, where out0.bin and out1.bin are written to.
// CALLED: the inputs of the call, where they differ from those that the layer was built for; the call follows a good onShapeChange.
// TAMPER: what is wrong with the library's name that an engine holds: 0 nothing, 1 another name, 2 no memory, 3 a negative
// length, 4 another type, 5 no name of its own.
// l: an attribute of two values; d: int64, which nothing takes. RANK may be one that no tensor has.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "NvInferRuntime.h"
#include "gpu.h"

using namespace nvinfer1;

namespace {

constexpr size_t kMostBytes = size_t{1} << 33;

struct Logger : ILogger {
  void log(Severity severity, AsciiChar const* text) noexcept override {
    std::printf("log %d %s\n", static_cast<int>(severity), text);
  }
};
struct Finder : ILoggerFinder {
  Logger logger;
  ILogger* findLogger() override { return &logger; }
};
struct Builder : IExprBuilder {};

struct Case {
  std::string op, broken, data;
  int gpu = 0, refused = 0, in_place = 0, tamper = 0;
  std::vector<std::string> names;
  std::vector<int32_t> ints;
  std::vector<float> floats;
  std::vector<PluginField> fields;
  std::vector<PluginTensorDesc> inputs, called;
};

std::vector<PluginTensorDesc> tensors(std::istream& in) {
  std::vector<PluginTensorDesc> all;
  size_t count = 0;
  in >> count;
  for (size_t i = 0; i < count; ++i) {
    char type = 0;
    PluginTensorDesc desc{};
    in >> type >> desc.dims.nbDims;
    for (int32_t d = 0; d < desc.dims.nbDims; ++d) {
      int64_t size = 0;
      in >> size;
      if (d < Dims::MAX_DIMS) desc.dims.d[d] = size;
    }
    desc.type = type == 'h'   ? DataType::kHALF
                : type == 'b' ? DataType::kBF16
                : type == 'f' ? DataType::kFLOAT
                              : DataType::kINT64;
    desc.format = TensorFormat::kLINEAR;
    all.push_back(desc);
  }
  return all;
}

// At most kMostBytes: what is larger is never allocated, because nothing may touch it.
size_t bytes(PluginTensorDesc const& desc) {
  size_t all = desc.type == DataType::kFLOAT ? 4 : desc.type == DataType::kINT64 ? 8 : 2;
  for (int32_t d = 0; d < std::min<int32_t>(desc.dims.nbDims, Dims::MAX_DIMS); ++d) {
    size_t const size = desc.dims.d[d] < 0 ? 0 : desc.dims.d[d];
    if (size != 0 && all > kMostBytes / size) return kMostBytes;
    all *= size;
  }
  return all;
}

Case parse(std::string const& line) {
  Case c;
  std::istringstream in(line);
  size_t fields = 0;
  in >> c.op >> c.gpu >> c.refused >> c.in_place >> c.tamper >> c.broken >> c.data >> fields;
  c.names.resize(fields), c.ints.resize(2 * fields + 2), c.floats.resize(fields);
  for (size_t i = 0; i < fields; ++i) {
    std::string kind, value;
    in >> c.names[i] >> kind >> value;
    c.ints[i] = c.floats[i] = 0;
    if (kind == "f")
      c.floats[i] = std::stof(value);
    else
      c.ints[i] = std::stoi(value);
    void const* const data = kind == "f" ? static_cast<void const*>(&c.floats[i]) : &c.ints[i];
    c.fields.emplace_back(c.names[i].c_str(), data, kind == "f" ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32,
                          kind == "l" ? 2 : 1);
  }
  c.inputs = tensors(in);
  c.called = tensors(in);
  return c;
}

template <class Capability>
Capability* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

// A network's layer: from attributes to what an engine would hold.
IPluginV3* build(IPluginCreatorV3One* creator, Case const& c, size_t& workspace) {
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
  workspace = step->getWorkspaceSize(io.data(), n, io.data() + n, 2);
  std::printf("built %d %d %d %zu\n", step->getAliasedInput(1), shapes[0].nbDims - 1, shapes[1].nbDims - 1, workspace);
  return plugin;
}

// The addresses of a call: the inputs, the outputs, the workspace.
std::vector<void*> places(Case const& c, std::vector<Buffer> const& buffers, size_t alias) {
  size_t const n = c.inputs.size();
  std::vector<void*> all;
  for (Buffer const& buffer : buffers) all.push_back(buffer.at());
  if (c.in_place == 1) all[n + 1] = all[alias];
  size_t const colon = c.broken.find(':');
  if (colon == std::string::npos) return all;
  size_t const place = std::stoul(c.broken);
  all[place] = c.broken.substr(colon + 1) == "null" ? nullptr : buffers[place].at(2);
  return all;
}

void collect(Case const& c, Gpu const& gpu, std::vector<Buffer> const& buffers, size_t alias) {
  size_t const n = c.inputs.size();
  for (size_t i = 0; i < n; ++i) {
    bool const replaced = c.in_place == 1 && i == alias;
    if (gpu.read(buffers[i], "input " + std::to_string(i)) != buffers[i].written && !replaced)
      std::printf("changed %zu\n", i);
  }
  for (size_t i = 0; i < 2; ++i) {
    Buffer const& place = i == 1 && c.in_place == 1 ? buffers[alias] : buffers[n + i];
    std::ofstream(c.data + "/out" + std::to_string(i) + ".bin", std::ios::binary)
        << gpu.read(place, "output " + std::to_string(i));
  }
  gpu.read(buffers[n + 2], "workspace");
}

void call(IPluginV3OneRuntime* step, Case const& c, Gpu& gpu, size_t workspace) {
  int32_t const n = static_cast<int32_t>(c.inputs.size());
  std::vector<PluginTensorDesc> const& called = c.called.empty() ? c.inputs : c.called;
  size_t const alias = c.op == "SSMScan" ? 7 : 1;
  std::vector<Buffer> buffers;
  for (PluginTensorDesc const& desc : called) buffers.push_back(gpu.allocate(bytes(desc)));
  for (size_t bytes_of : {bytes(called[0]), bytes(called[alias]), workspace}) buffers.push_back(gpu.allocate(bytes_of));
  for (size_t i = 0; c.data != "-" && i < called.size(); ++i) {
    std::ifstream file(c.data + "/" + std::to_string(i) + ".bin", std::ios::binary);
    gpu.write(buffers[i], {std::istreambuf_iterator<char>(file), {}});
  }
  PluginTensorDesc outputs[2]{called[0], called[alias]};
  bool const ready = step->onShapeChange(c.inputs.data(), n, outputs, 2) == 0;
  // TensorRT ends where a change of shapes fails; a call all the same must not use an earlier plan.
  bool const changed = ready && (c.called.empty() || step->onShapeChange(called.data(), n, outputs, 2) == 0);
  if (ready && (changed || !c.called.empty())) {
    std::vector<void*> const at = places(c, buffers, alias);
    std::vector<void const*> const inputs(at.begin(), at.begin() + n);
    void* results[] = {at[n], at[n + 1]};
    int const code = step->enqueue(called.data(), outputs, inputs.data(), results, at[n + 2],
                                   static_cast<cudaStream_t>(gpu.stream()));
    std::printf("enqueued %d\n", code);
    if (gpu.finish() && code == 0 && c.data != "-") collect(c, gpu, buffers, alias);
  }
  gpu.finish();
  gpu.release(buffers);
}

void run(IPluginCreatorV3One* creator, Case const& c, Gpu& gpu) {
  size_t workspace = 0;
  IPluginV3* const plugin = build(creator, c, workspace);
  if (plugin == nullptr) return;
  auto const* const stored =
      capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  std::vector<PluginField> fields(stored->fields, stored->fields + stored->nbFields);
  PluginField& library = fields.back();
  if (c.tamper == 1) library.data = "00000000000000000000000000000000";
  if (c.tamper == 2) library.data = nullptr;
  if (c.tamper == 3) library.length = -1;
  if (c.tamper == 4) library.type = PluginFieldType::kINT32;
  if (c.tamper == 5) library.name = nullptr;
  PluginFieldCollection const engine{stored->nbFields, fields.data()};
  IPluginV3* const loaded = creator->createPlugin("layer", &engine, TensorRTPhase::kRUNTIME);
  if (loaded == nullptr) return;
  IPluginV3* const attached =
      capability<IPluginV3OneRuntime>(loaded, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
  call(capability<IPluginV3OneRuntime>(attached, PluginCapabilityType::kRUNTIME), c, gpu, workspace);
}

}  // namespace

int main(int, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a crash leaves what was printed before it
  void* const library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) return std::printf("%s\n", dlerror()), 1;
  Gpu gpu;
  if (gpu.failed()) return 1;
  auto const creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  Finder finder;
  reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* const all = creators(count);
  for (std::string line; std::getline(std::cin, line);) {
    Case const c = parse(line);
    std::printf("case\n");
    gpu.pretend(c.gpu, c.refused);
    for (int32_t i = 0; i < count; ++i) {
      auto* const creator = static_cast<IPluginCreatorV3One*>(all[i]);
      if (c.op == creator->getPluginName()) run(creator, c, gpu);
    }
  }
  return 0;
}
