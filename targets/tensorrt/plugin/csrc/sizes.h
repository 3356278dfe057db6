// The sizes of a call by their names in ops.h: batch, tokens, heads, ...
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "tensors.h"

namespace h1 {

using nvinfer1::DataType;
using nvinfer1::Dims;

class Sizes {
 public:
  int64_t at(char const* name) const { return values_.at(name); }
  bool has(char const* name) const { return values_.count(name) != 0; }

  // Takes the sizes of an input; -1: not known yet. False, and why, where they contradict the op, or one is 0.
  bool add(Tensor const& tensor, Dims const& dims, std::string& why) {
    bool agrees = dims.nbDims == tensor.rank;
    for (int32_t i = 0; agrees && i < tensor.rank; ++i) {
      if (dims.d[i] < 0) continue;
      if (dims.d[i] == 0) {
        why = std::string("input ") + tensor.name + " is " + text(dims) + ", which has no elements";
        return false;
      }
      auto const [place, fresh] = values_.emplace(tensor.sizes[i], dims.d[i]);
      agrees = place->second == dims.d[i];
    }
    if (!agrees) {
      why = std::string("input ") + tensor.name + " is " + text(dims) + ", and should be " + expected(tensor);
    }
    return agrees;
  }

  // Takes the sizes of an input, all of which must be known.
  bool add_known(Tensor const& tensor, Dims const& dims, std::string& why) {
    if (!add(tensor, dims, why)) return false;
    for (int32_t i = 0; i < tensor.rank; ++i) {
      if (dims.d[i] >= 0) continue;
      why = std::string("input ") + tensor.name + " is " + text(dims) + ", and every size must be known here";
      return false;
    }
    return true;
  }

 private:
  static std::string text(Dims const& dims) {
    std::string all;
    for (int32_t i = 0; i < dims.nbDims; ++i) all += (i ? ", " : "") + std::to_string(dims.d[i]);
    return "[" + all + "]";
  }

  std::string expected(Tensor const& tensor) const {
    std::string all;
    for (int32_t i = 0; i < tensor.rank; ++i) {
      auto const known = values_.find(tensor.sizes[i]);
      all += std::string(i ? ", " : "") + tensor.sizes[i] +
             (known == values_.end() ? "" : " " + std::to_string(known->second));
    }
    return "[" + all + "]";
  }

  std::map<std::string, int64_t> values_;
};

}  // namespace h1
