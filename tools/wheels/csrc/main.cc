// kernel_host LIBRARY: reads a node from standard input, computes it with the kernels of that library in the stand-in for
// ONNX Runtime, and writes its outputs, or its error, to standard output. So the kernels run where there is no ONNX
// Runtime and no Python: on another CPU that an emulator pretends to be. tests/kernel_hosts.py is the other side.
//
// All numbers are little-endian. A text: u32 bytes, the bytes. A tensor: i32 dtype as in ONNX (-1: absent), u32 rank, i64
// sizes, the elements.
//   node: op; u32 count, (name, i64) of integers; u32 count, (name, f32) of reals; u32 count, tensors; u32 outputs;
//         u32 count, (u32 output, u32 input) in place; u32 threads
//   answer: error; u32 count, tensors, unless the error has a text
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "host.h"

namespace {

const char* library = nullptr;

[[noreturn]] void fail(const char* what) { std::fprintf(stderr, "kernel_host: %s\n", what), std::exit(2); }

void read(void* to, size_t bytes) {
  if (bytes != 0 && std::fread(to, bytes, 1, stdin) != 1) fail("the node ends early");
}

void write(const void* from, size_t bytes) {
  if (bytes != 0 && std::fwrite(from, bytes, 1, stdout) != 1) fail("the answer cannot be written");
}

template <class T>
T read() {
  T value;
  read(&value, sizeof value);
  return value;
}

template <class T>
void write(T value) {
  write(&value, sizeof value);
}

std::string read_text() {
  std::string text(read<uint32_t>(), 0);
  read(text.data(), text.size());
  return text;
}

host::Tensor read_tensor(bool& given) {
  host::Tensor tensor;
  const auto type = read<int32_t>();
  given = type >= 0;
  if (!given) return tensor;
  tensor.type = static_cast<ONNXTensorElementDataType>(type);
  tensor.shape.resize(read<uint32_t>());
  for (int64_t& size : tensor.shape) size = read<int64_t>();
  tensor.memory.resize(static_cast<size_t>(host::elements(tensor.shape, INT32_MAX)) * host::width_of(tensor.type));
  read(tensor.memory.data(), tensor.memory.size());
  return tensor;
}

void write_tensor(const host::Tensor& tensor) {
  write(static_cast<int32_t>(tensor.type));
  write(static_cast<uint32_t>(tensor.shape.size()));
  for (const int64_t size : tensor.shape) write(size);
  write(tensor.memory.data(), tensor.memory.size());
}

host::Node read_node() {
  host::Node node;
  node.op = read_text();
  for (auto count = read<uint32_t>(); count > 0; --count) {
    const std::string name = read_text();
    node.integers[name] = read<int64_t>();
  }
  for (auto count = read<uint32_t>(); count > 0; --count) {
    const std::string name = read_text();
    node.reals[name] = read<float>();
  }
  for (auto count = read<uint32_t>(); count > 0; --count) {
    bool given = false;
    node.inputs.push_back(read_tensor(given));
    node.given.push_back(given);
  }
  node.outputs = read<uint32_t>();
  for (auto count = read<uint32_t>(); count > 0; --count) {
    const auto output = read<uint32_t>();
    node.in_place[output] = read<uint32_t>();
  }
  node.threads = read<uint32_t>();
  return node;
}

}  // namespace

// What the stand-in registers: the ops of the library that the command line names.
extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) fail(dlerror());
  using Register = OrtStatus* (*)(OrtSessionOptions*, const OrtApiBase*);
  const auto registered = reinterpret_cast<Register>(dlsym(handle, "RegisterCustomOps"));
  if (registered == nullptr) fail(dlerror());
  return registered(options, base);
}

int main(int count, char** words) {
  if (count != 2) return std::fprintf(stderr, "usage: kernel_host LIBRARY\n"), 2;
  library = words[1];
  host::Node node = read_node();
  const host::Result result = host::run(node, 1);
  write(static_cast<uint32_t>(result.error.size()));
  write(result.error.data(), result.error.size());
  if (!result.error.empty()) return 0;
  write(static_cast<uint32_t>(node.outputs));
  for (size_t i = 0; i < node.outputs; ++i) {
    const auto replaced = node.in_place.find(i);
    write_tensor(replaced == node.in_place.end() ? result.outputs[i] : node.inputs[replaced->second]);
  }
  return 0;
}
