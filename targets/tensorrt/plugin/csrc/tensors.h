// What the generated ops.h is written in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "NvInferRuntime.h"

namespace h1 {

using nvinfer1::PluginFieldType;

// An input: `own` where it has the dtype of x, float32 otherwise; sizes of one name are equal in all inputs.
struct Tensor {
  char const* name;
  bool own;
  int32_t rank;
  char const* sizes[4];
};

// An attribute of an op, and its place in the Attributes.
struct Field {
  char const* name;
  PluginFieldType type;
  size_t offset;
};

// What cuLaunchKernel takes: a pointer to each argument. Triton's kernels take two more pointers, to scratch memory
// that ours do not use.
inline std::vector<void*> pointers(std::initializer_list<void const*> arguments) {
  static void* scratch = nullptr;
  std::vector<void*> all;
  for (void const* argument : arguments) all.push_back(const_cast<void*>(argument));
  all.push_back(&scratch);
  all.push_back(&scratch);
  return all;
}

}  // namespace h1
