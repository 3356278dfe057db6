// The little of ONNX Runtime's C API that ops need: attributes, tensors, its thread pool, and Op<Kernel>, which turns a
// class into an OrtCustomOp. Compute kernels do not include this file: they are functions over raw pointers.
#pragma once

#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_c_api.h"
#include "parallel.h"

namespace h1 {

// Set once, when the library is registered.
inline const OrtApi* api = nullptr;

// Throws what ONNX Runtime reports.
inline void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

// For conditions on shapes and attributes: the message reaches the user as ONNX Runtime's exception.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// A node's attributes.
class Attributes {
 public:
  explicit Attributes(const OrtKernelInfo* info) : info_(info) {}

  int64_t integer(const char* name) const {
    int64_t value = 0;
    check(api->KernelInfoGetAttribute_int64(info_, name, &value));
    return value;
  }

  float real(const char* name) const {
    float value = 0;
    check(api->KernelInfoGetAttribute_float(info_, name, &value));
    return value;
  }

 private:
  const OrtKernelInfo* info_;
};

using Shape = std::vector<int64_t>;

// Returns a size of ONNX Runtime, which is not negative, as kernels take it.
inline size_t as_size(int64_t size) { return static_cast<size_t>(size); }

// A contiguous tensor; `data` is null when an optional input is absent.
template <class T>
struct Tensor {
  T* data = nullptr;
  Shape shape;

  explicit operator bool() const { return data != nullptr; }
  int64_t size() const { return product(0); }
  int64_t last() const { return shape.back(); }   // width of a row
  int64_t rows() const { return product(0, 1); }  // all dimensions but the last, flattened

 private:
  int64_t product(size_t from, size_t without = 0) const {
    int64_t result = 1;
    for (size_t i = from; i + without < shape.size(); ++i) result *= shape[i];
    return result;
  }
};

// One call of a node.
class Call {
 public:
  explicit Call(OrtKernelContext* context)
      : parallel([context](size_t count, const std::function<void(size_t)>& body) { run(context, count, body); }),
        context_(context) {}

  template <class T>
  Tensor<const T> input(size_t index) const {
    size_t count = 0;
    check(api->KernelContext_GetInputCount(context_, &count));
    const OrtValue* value = nullptr;
    if (index < count) check(api->KernelContext_GetInput(context_, index, &value));
    if (value == nullptr) return {};
    void* data = nullptr;
    // the C API has no const accessor; T is const
    check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    return {static_cast<const T*>(data), shape_of(value)};
  }

  template <class T>
  Tensor<T> output(size_t index, const Shape& shape) const {
    OrtValue* value = nullptr;
    check(api->KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(api->GetTensorMutableData(value, &data));
    return {static_cast<T*>(data), shape};
  }

  const Parallel parallel;  // over the session's own thread pool

 private:
  static Shape shape_of(const OrtValue* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api->GetTensorTypeAndShape(value, &info));
    size_t rank = 0;
    OrtStatus* status = api->GetDimensionsCount(info, &rank);
    Shape shape(rank);
    if (status == nullptr) status = api->GetDimensions(info, shape.data(), rank);
    api->ReleaseTensorTypeAndShapeInfo(info);
    check(status);
    return shape;
  }

  static void run(const OrtKernelContext* context, size_t count, const std::function<void(size_t)>& body) {
    if (count == 1) return body(0);
    const auto call = [](void* user, size_t index) { (*static_cast<const std::function<void(size_t)>*>(user))(index); };
    void* user = const_cast<std::function<void(size_t)>*>(&body);
    check(api->KernelContext_ParallelFor(context, call, count, 0, user));  // 0 batches: items are handed out one by one
  }

  OrtKernelContext* context_;
};

// An input or an output as the op declares it.
struct Port {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  bool optional = false;
};
inline constexpr Port kFloat{};
inline constexpr Port kOptionalFloat{.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, .optional = true};
inline constexpr Port kHalf{.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16};
inline constexpr Port kUInt8{.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8};
inline constexpr Port kInt64{.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64};

// The OrtCustomOp of a class with `name`, `inputs`, `outputs` (arrays of Port), a constructor from Attributes and
// `void compute(const Call&) const`, which may run in several threads at once.
template <class Kernel>
struct Op : OrtCustomOp {
  Op() : OrtCustomOp{} {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp*) { return Kernel::name; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
    GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::inputs); };
    GetInputType = [](const OrtCustomOp*, size_t index) { return Kernel::inputs[index].type; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) { return characteristic(Kernel::inputs[index]); };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::outputs); };
    GetOutputType = [](const OrtCustomOp*, size_t index) { return Kernel::outputs[index].type; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) { return characteristic(Kernel::outputs[index]); };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return guarded([&] { *kernel = new Kernel(Attributes(info)); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded([&] { static_cast<const Kernel*>(kernel)->compute(Call(context)); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

 private:
  static OrtCustomOpInputOutputCharacteristic characteristic(const Port& port) {
    return port.optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }

  // No exception may cross the C interface.
  template <class Body>
  static OrtStatus* guarded(const Body& body) {
    try {
      body();
      return nullptr;
    } catch (const std::exception& error) {
      return api->CreateStatus(ORT_FAIL, (std::string(Kernel::name) + ": " + error.what()).c_str());
    }
  }
};

}  // namespace h1
