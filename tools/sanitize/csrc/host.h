// A stand-in for ONNX Runtime that runs one node of ours: the few functions of its C API that csrc uses, over memory that
// ends where a tensor ends, so that a sanitizer sees every access outside. Threads are started for each parallel loop.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "onnxruntime_c_api.h"

namespace host {

struct Tensor {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  std::vector<int64_t> shape;
  std::vector<char> memory;  // `shift` bytes, then the elements
  size_t shift = 0;          // 0: aligned

  void* data() { return memory.data() + shift; }
  size_t bytes() const { return memory.size() - shift; }
};

struct Node {
  std::string op;
  std::map<std::string, int64_t> integers;
  std::map<std::string, float> reals;
  std::vector<Tensor> inputs;
  std::vector<bool> given;            // false: an optional input is left out
  size_t outputs = 1;                 // how many the graph asks for
  std::map<size_t, size_t> in_place;  // output -> the input whose memory it is, where their shapes are equal
  size_t threads = 1;
};

struct Result {
  std::string error;  // empty: the node ran
  std::vector<Tensor> outputs;
};

// Bytes of an element; 0 for a dtype that no op of ours has.
size_t width_of(ONNXTensorElementDataType type);

// Elements of a shape, or -1 where they are more than `most`.
int64_t elements(const std::vector<int64_t>& shape, int64_t most);

// Makes the kernel once, and computes `calls` times at once in as many threads; the result is the first call's.
Result run(Node& node, size_t calls);

}  // namespace host
