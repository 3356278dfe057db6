#include "host.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <thread>

struct OrtStatus {
  std::string message;
};
struct OrtValue {
  host::Tensor* tensor;
};
struct OrtTensorTypeAndShapeInfo {
  const host::Tensor* tensor;
};
struct OrtKernelInfo {
  const host::Node* node;
};
struct OrtKernelContext {
  host::Node* node;
  const OrtCustomOp* op;
  std::vector<OrtValue> inputs, outputs;
  std::vector<host::Tensor> made;
};
struct OrtCustomOpDomain {};
struct OrtSessionOptions {};

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

namespace host {
namespace {

constexpr int64_t kMostElements = 1 << 24;  // of an output; ONNX Runtime ends a larger one than memory likewise
constexpr unsigned char kUnwritten = 0xee;

// Ops of one name take other dtypes.
std::multimap<std::string, const OrtCustomOp*>& ops() {
  static std::multimap<std::string, const OrtCustomOp*> found;
  return found;
}

OrtStatus* failed(std::string message) { return new OrtStatus{std::move(message)}; }

template <class Values, class Value>
OrtStatus* attribute(const Values& values, const char* name, Value* value) {
  const auto found = values.find(name);
  if (found == values.end()) return failed(std::string("no attribute with name ") + name);
  *value = found->second;
  return nullptr;
}

OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t rank, OrtValue** value) {
  if (index >= context->outputs.size()) return *value = nullptr, nullptr;  // the graph does not ask for it
  const std::vector<int64_t> shape(sizes, sizes + rank);
  const int64_t count = elements(shape, kMostElements);
  if (count < 0) return failed("Failed to allocate memory for requested buffer");
  const auto replaced = context->node->in_place.find(index);
  Tensor& tensor = context->made[index];
  if (replaced != context->node->in_place.end() && context->node->inputs[replaced->second].shape == shape) {
    context->outputs[index].tensor = &context->node->inputs[replaced->second];
  } else {
    tensor.shape = shape;
    tensor.type = context->op->GetOutputType(context->op, index);
    tensor.memory.assign(static_cast<size_t>(count) * width_of(tensor.type), static_cast<char>(kUnwritten));
    context->outputs[index].tensor = &tensor;
  }
  return *value = &context->outputs[index], nullptr;
}

// Hands items out one by one to the threads of the node.
OrtStatus* parallel_for(const OrtKernelContext* context, void (*body)(void*, size_t), size_t total, size_t,
                        void* user) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t item = next++; item < total; item = next++) body(user, item);
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < context->node->threads; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  return nullptr;
}

const OrtApi* make_api() {
  static OrtApi api{};
  api.CreateStatus = [](OrtErrorCode, const char* text) noexcept { return failed(text); };
  api.GetErrorMessage = [](const OrtStatus* status) noexcept { return status->message.c_str(); };
  api.ReleaseStatus = [](OrtStatus* status) noexcept { delete status; };
  api.KernelInfoGetAttribute_int64 = [](const OrtKernelInfo* info, const char* name, int64_t* value) noexcept {
    return attribute(info->node->integers, name, value);
  };
  api.KernelInfoGetAttribute_float = [](const OrtKernelInfo* info, const char* name, float* value) noexcept {
    return attribute(info->node->reals, name, value);
  };
  api.KernelContext_GetInputCount = [](const OrtKernelContext* context, size_t* count) noexcept {
    return *count = context->inputs.size(), static_cast<OrtStatus*>(nullptr);
  };
  api.KernelContext_GetInput = [](const OrtKernelContext* context, size_t index, const OrtValue** value) noexcept {
    if (index >= context->inputs.size()) return failed("no such input");
    const OrtValue& input = context->inputs[index];
    return *value = input.tensor == nullptr ? nullptr : &input, static_cast<OrtStatus*>(nullptr);
  };
  api.KernelContext_GetOutput = [](OrtKernelContext* context, size_t index, const int64_t* sizes, size_t rank,
                                   OrtValue** value) noexcept { return output(context, index, sizes, rank, value); };
  api.KernelContext_ParallelFor = [](const OrtKernelContext* context, void (*body)(void*, size_t), size_t total,
                                     size_t batches,
                                     void* user) noexcept { return parallel_for(context, body, total, batches, user); };
  api.GetTensorMutableData = [](OrtValue* value, void** data) noexcept {
    return *data = value->tensor->bytes() == 0 ? nullptr : value->tensor->data(), static_cast<OrtStatus*>(nullptr);
  };
  api.GetTensorTypeAndShape = [](const OrtValue* value, OrtTensorTypeAndShapeInfo** info) noexcept {
    return *info = new OrtTensorTypeAndShapeInfo{value->tensor}, static_cast<OrtStatus*>(nullptr);
  };
  api.GetTensorElementType = [](const OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType* type) noexcept {
    return *type = info->tensor->type, static_cast<OrtStatus*>(nullptr);
  };
  api.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo* info, size_t* rank) noexcept {
    return *rank = info->tensor->shape.size(), static_cast<OrtStatus*>(nullptr);
  };
  api.GetDimensions = [](const OrtTensorTypeAndShapeInfo* info, int64_t* sizes, size_t rank) noexcept {
    std::copy_n(info->tensor->shape.begin(), std::min(rank, info->tensor->shape.size()), sizes);
    return static_cast<OrtStatus*>(nullptr);
  };
  api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo* info) noexcept { delete info; };
  api.CreateCustomOpDomain = [](const char*, OrtCustomOpDomain** domain) noexcept {
    static OrtCustomOpDomain only;
    return *domain = &only, static_cast<OrtStatus*>(nullptr);
  };
  api.CustomOpDomain_Add = [](OrtCustomOpDomain*, const OrtCustomOp* op) noexcept {
    ops().emplace(op->GetName(op), op);
    return static_cast<OrtStatus*>(nullptr);
  };
  api.AddCustomOpDomain = [](OrtSessionOptions*, OrtCustomOpDomain*) noexcept {
    return static_cast<OrtStatus*>(nullptr);
  };
  return &api;
}

const OrtApi* the_api() {
  static const OrtApi* const api = make_api();
  return api;
}

// The message of a status, which is released; nothing where there is none.
std::string taken(OrtStatus* status) {
  if (status == nullptr) return "";
  const std::string message = status->message.empty() ? "an error without a message" : status->message;
  delete status;
  return message;
}

bool takes(const OrtCustomOp* op, const Node& node) {
  for (size_t i = 0; i < std::min(node.inputs.size(), op->GetInputTypeCount(op)); ++i) {
    if (node.given[i] && node.inputs[i].type != op->GetInputType(op, i)) return false;
  }
  return true;
}

// The op of the node's name that takes its dtypes, or any of the name, which then refuses them.
const OrtCustomOp* op_of(const Node& node) {
  if (ops().empty()) {
    static const OrtApiBase base{.GetApi = [](uint32_t) noexcept { return the_api(); },
                                 .GetVersionString = []() noexcept { return "stand-in"; }};
    OrtSessionOptions options;
    const std::string error = taken(RegisterCustomOps(&options, &base));
    if (!error.empty()) std::fprintf(stderr, "%s\n", error.c_str()), std::abort();
  }
  const auto [begin, end] = ops().equal_range(node.op);
  if (begin == end) std::fprintf(stderr, "no op %s\n", node.op.c_str()), std::abort();
  const auto found = std::find_if(begin, end, [&](const auto& named) { return takes(named.second, node); });
  return (found == end ? begin : found)->second;
}

Result compute(const OrtCustomOp* op, void* kernel, Node& node) {
  OrtKernelContext context{.node = &node, .op = op, .inputs = {}, .outputs = {}, .made = {}};
  context.outputs.resize(node.outputs), context.made.resize(node.outputs);
  for (size_t i = 0; i < node.inputs.size(); ++i) context.inputs.push_back({node.given[i] ? &node.inputs[i] : nullptr});
  Result result;
  result.error = taken(op->KernelComputeV2(kernel, &context));
  result.outputs = std::move(context.made);
  return result;
}

}  // namespace

size_t width_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return 4;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return 8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return 1;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return 2;
    default:
      return 0;
  }
}

int64_t elements(const std::vector<int64_t>& shape, int64_t most) {
  for (const int64_t size : shape) {
    if (size == 0) return 0;
  }
  int64_t count = 1;
  for (const int64_t size : shape) {
    if (size < 0 || size > most / count) return -1;
    count *= size;
  }
  return count;
}

Result run(Node& node, size_t calls) {
  const OrtCustomOp* const op = op_of(node);
  const OrtKernelInfo info{&node};
  void* kernel = nullptr;
  Result result{.error = taken(op->CreateKernelV2(op, the_api(), &info, &kernel)), .outputs = {}};
  if (!result.error.empty()) return result;
  std::vector<Node> copies(calls - 1, node);
  std::vector<std::thread> threads;
  for (Node& copy : copies) threads.emplace_back([&] { compute(op, kernel, copy); });
  result = compute(op, kernel, node);
  for (std::thread& thread : threads) thread.join();
  op->KernelDestroy(kernel);
  return result;
}

}  // namespace host
