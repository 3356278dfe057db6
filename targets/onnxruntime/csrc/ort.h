// The little of ONNX Runtime's C API that ops need: attributes, tensors, its thread pool, and Op<Kernel>, which turns a
// class into an OrtCustomOp. Compute kernels do not include this file: they are functions over raw pointers. A graph is
// not believed: attributes have bounds, and every input has the dtype and rank that its op declares, or the call ends
// in an error.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <initializer_list>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "onnxruntime_c_api.h"
#include "parallel.h"
#include "sizes.h"

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

// A node's attributes.
class Attributes {
 public:
  explicit Attributes(const OrtKernelInfo* info) : info_(info) {}

  int64_t integer(const char* name) const {
    int64_t value = 0;
    check(api->KernelInfoGetAttribute_int64(info_, name, &value));
    return value;
  }

  // 1 to `most`.
  Size size(const char* name, int64_t most = kMostWidth) const { return bounded(name, integer(name), 1, most); }

  // The first column that is read, from 0.
  Size offset(const char* name) const { return bounded(name, integer(name), 0, kMostWidth); }

  // A number; it may be infinite.
  float real(const char* name) const {
    float value = 0;
    check(api->KernelInfoGetAttribute_float(info_, name, &value));
    if (std::isnan(value)) throw std::invalid_argument(std::string("attribute ") + name + " is not a number");
    return value;
  }

  float finite(const char* name) const {
    const float value = real(name);
    if (std::isinf(value)) throw std::invalid_argument(std::string("attribute ") + name + " is infinite");
    return value;
  }

 private:
  const OrtKernelInfo* info_;
};

constexpr size_t kMostRank = 8;  // of a tensor that an op takes

// The sizes of a tensor, without an allocation: every input of every node of every token has one.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<Size> sizes) : Shape(sizes.begin(), sizes.size()) {}
  template <class Number>
  Shape(const Number* sizes, size_t rank) : rank_(rank) {
    require(rank <= kMostRank, "a tensor has too many dimensions");
    std::copy_n(sizes, rank, sizes_);
  }

  size_t rank() const { return rank_; }
  Size operator[](size_t i) const { return sizes_[checked(i)]; }
  Size& back() { return sizes_[checked(rank_ - 1)]; }
  Size product(size_t dimensions) const {
    Size result = 1;
    for (size_t i = 0; i < dimensions; ++i) result = result * (*this)[i];
    return result;
  }
  friend bool operator==(const Shape& a, const Shape& b) {
    return std::equal(a.sizes_, a.sizes_ + a.rank_, b.sizes_, b.sizes_ + b.rank_);
  }

 private:
  size_t checked(size_t i) const {
    require(i < rank_, "a tensor has too few dimensions");
    return i;
  }

  Size sizes_[kMostRank];
  size_t rank_ = 0;
};

// A contiguous tensor; not `given`: an optional input that is absent. Without elements `data` may be null.
template <class T>
struct Tensor {
  T* data = nullptr;
  Shape shape;
  bool given = false;

  explicit operator bool() const { return given; }
  Size size() const { return shape.product(shape.rank()); }
  Size last() const { return shape[shape.rank() - 1]; }          // width of a row
  Size rows() const { return shape.product(shape.rank() - 1); }  // all dimensions but the last; the rank is not 0
  T* from(Size offset) const { return data + offset.value(); }   // of columns that lie within a row
};

// An input or an output as the op declares it; rank 0: any but 0.
struct Port {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  uint32_t rank = 0;
  bool optional = false;
};
constexpr Port floats(uint32_t rank = 0) { return {.rank = rank}; }
constexpr Port optional_floats(uint32_t rank) { return {.rank = rank, .optional = true}; }
constexpr Port halves(uint32_t rank) { return {.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, .rank = rank}; }
constexpr Port signed_bytes(uint32_t rank) { return {.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, .rank = rank}; }
constexpr Port bytes(uint32_t rank) { return {.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, .rank = rank}; }
constexpr Port integers(uint32_t rank) { return {.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, .rank = rank}; }

// What a kernel reads an input as.
template <class T>
constexpr bool reads(ONNXTensorElementDataType type) {
  constexpr bool kFloat = std::is_same_v<T, float>, kInteger = std::is_same_v<T, int64_t>;
  constexpr bool kByte = std::is_same_v<T, uint8_t>, kSignedByte = std::is_same_v<T, int8_t>;
  return type == (kFloat        ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                  : kInteger    ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
                  : kByte       ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
                  : kSignedByte ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8
                                : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
}

// One call of a node, whose inputs are declared by `ports`.
class Call {
 public:
  Call(OrtKernelContext* context, const Port* ports)
      : parallel([context](size_t count, const std::function<void(size_t)>& body) { run(context, count, body); }),
        context_(context),
        ports_(ports) {}

  template <class T>
  Tensor<const T> input(size_t index) const {
    size_t count = 0;
    check(api->KernelContext_GetInputCount(context_, &count));
    const OrtValue* value = nullptr;
    if (index < count) check(api->KernelContext_GetInput(context_, index, &value));
    if (value == nullptr) {
      if (!ports_[index].optional) refuse(index, "is missing");
      return {};
    }
    Tensor<const T> tensor{.data = nullptr, .shape = checked_shape<T>(value, index), .given = true};
    void* data = nullptr;
    // the C API has no const accessor; T is const
    check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    const bool empty = tensor.size() == Size{0};
    if (!empty && data == nullptr) refuse(index, "has no memory");
    // external data may begin at any byte of its file
    if (!empty && reinterpret_cast<uintptr_t>(data) % alignof(T) != 0) refuse(index, "is not aligned in its file");
    tensor.data = empty ? nullptr : static_cast<const T*>(data);
    return tensor;
  }

  template <class T>
  Tensor<T> output(size_t index, const Shape& shape) const {
    int64_t sizes[kMostRank];
    for (size_t i = 0; i < shape.rank(); ++i) sizes[i] = shape[i].value();
    Tensor<T> tensor{.data = nullptr, .shape = shape, .given = true};
    const bool empty = tensor.size() * Size{sizeof(T)} == Size{0};
    OrtValue* value = nullptr;
    check(api->KernelContext_GetOutput(context_, index, sizes, shape.rank(), &value));
    require(value != nullptr, "an output is missing");
    void* data = nullptr;
    check(api->GetTensorMutableData(value, &data));
    require(empty || data != nullptr, "an output has no memory");
    tensor.data = empty ? nullptr : static_cast<T*>(data);
    return tensor;
  }

  const Parallel parallel;  // over the session's own thread pool

 private:
  [[noreturn]] static void refuse(size_t index, const std::string& why) {
    throw std::invalid_argument("input " + std::to_string(index) + " " + why);
  }

  template <class T>
  Shape checked_shape(const OrtValue* value, size_t index) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api->GetTensorTypeAndShape(value, &info));
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    size_t rank = 0;
    int64_t sizes[kMostRank];
    OrtStatus* status = api->GetTensorElementType(info, &type);
    if (status == nullptr) status = api->GetDimensionsCount(info, &rank);
    if (status == nullptr && rank <= kMostRank) status = api->GetDimensions(info, sizes, rank);
    api->ReleaseTensorTypeAndShapeInfo(info);
    check(status);
    const Port& port = ports_[index];
    if (type != port.type || !reads<T>(type)) refuse(index, "has another dtype than the op takes");
    if (rank == 0 || rank > kMostRank || (port.rank != 0 && rank != port.rank)) {
      refuse(index, "has rank " + std::to_string(rank) + ", and must have " +
                        (port.rank == 0 ? "1 to 8" : std::to_string(port.rank)));
    }
    return {sizes, rank};
  }

  // No exception may leave a thread of the pool: what the first one says is thrown again where the loop was started. A
  // std::exception_ptr would need a newer libstdc++ than a wheel may ask for.
  static void run(const OrtKernelContext* context, size_t count, const std::function<void(size_t)>& body) {
    if (count == 0) return;
    if (count == 1) return body(0);
    Loop loop{.body = body};
    const auto call = [](void* user, size_t index) { static_cast<Loop*>(user)->item(index); };
    check(api->KernelContext_ParallelFor(context, call, count, 0, &loop));  // 0 batches: items go out one by one
    if (loop.failed && loop.message[0] == 0) throw std::bad_alloc();
    if (loop.failed) throw std::runtime_error(loop.message);
  }

  struct Loop {
    const std::function<void(size_t)>& body;
    std::mutex mutex = {};
    bool failed = false;
    char message[256] = {};  // empty: there was no memory

    void item(size_t index) noexcept {
      try {
        body(index);
      } catch (const std::bad_alloc&) {
        keep("");
      } catch (const std::exception& error) {
        keep(error.what());
      }
    }

    void keep(const char* what) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (failed) return;
      failed = true;
      std::snprintf(message, sizeof message, "%s", what);
    }
  };

  OrtKernelContext* context_;
  const Port* ports_;
};

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
      return guarded([&] { static_cast<const Kernel*>(kernel)->compute(Call(context, Kernel::inputs)); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

 private:
  static OrtCustomOpInputOutputCharacteristic characteristic(const Port& port) {
    return port.optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }

  // No exception may cross the C interface.
  template <class Body>
  static OrtStatus* guarded(const Body& body) noexcept {
    try {
      body();
      return nullptr;
    } catch (const std::bad_alloc&) {
      return failed("there is not enough memory");
    } catch (const std::exception& error) {
      return failed(error.what());
    }
  }

  static OrtStatus* failed(const char* what) noexcept {
    try {
      return api->CreateStatus(ORT_FAIL, (std::string(Kernel::name) + ": " + what).c_str());
    } catch (const std::exception&) {  // no memory even for the message
      return api->CreateStatus(ORT_FAIL, Kernel::name);
    }
  }
};

}  // namespace h1
