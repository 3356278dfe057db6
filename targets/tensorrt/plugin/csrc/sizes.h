// The sizes of a call by their names in ops.h: batch, tokens, heads, ... An engine or a network may be a stranger's, so
// sizes have bounds, and products of them do not wrap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <map>
#include <string>

#include "tensors.h"

namespace h1 {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr int64_t kMostSize = std::numeric_limits<int32_t>::max();   // kernels take sizes as int32
constexpr int64_t kMostBytes = std::numeric_limits<int64_t>::max();  // what a product that is too large becomes
constexpr int64_t kMostRank = Dims::MAX_DIMS;

// The product of numbers that are not negative, or kMostBytes where it is larger.
inline int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (int64_t const factor : factors) {
    if (factor == 0) return 0;
    result = result > kMostBytes / factor ? kMostBytes : result * factor;
  }
  return result;
}

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
      if (dims.d[i] > kMostSize) {
        why = std::string("input ") + tensor.name + " is " + text(dims) + ", and a size is larger than " +
              std::to_string(kMostSize);
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
    int64_t bytes = sizeof(float);
    for (int32_t i = 0; i < tensor.rank; ++i) bytes = product({bytes, dims.d[i]});
    if (bytes == kMostBytes) {
      why = std::string("input ") + tensor.name + " is " + text(dims) + ", which no memory holds";
      return false;
    }
    return true;
  }

 private:
  static std::string text(Dims const& dims) {
    std::string all;
    int64_t const rank = std::min<int64_t>(dims.nbDims, kMostRank);  // a rank that no tensor has is shown in part
    for (int64_t i = 0; i < rank; ++i) all += (i ? ", " : "") + std::to_string(dims.d[i]);
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
