// Arithmetic on the sizes, offsets and counts of a graph, which may be a stranger's: a result that cannot be right throws
// std::invalid_argument. Compute kernels are given sizes that were checked here, each within memory that exists.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace h1 {

// For conditions on shapes and attributes: the message reaches the user as ONNX Runtime's exception.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// A number that is not negative; sums, differences and products of them neither wrap nor become negative.
class Size {
 public:
  constexpr Size() = default;
  constexpr Size(int64_t value)
      : value_(value) {  // NOLINT(google-explicit-constructor): sizes of ONNX Runtime are int64
    if (value < 0) throw std::invalid_argument("a size is negative");
  }

  constexpr int64_t value() const { return value_; }
  constexpr size_t count() const { return static_cast<size_t>(value_); }

  friend constexpr auto operator<=>(Size, Size) = default;

  friend constexpr Size operator+(Size a, Size b) {
    int64_t result = 0;
    if (__builtin_add_overflow(a.value_, b.value_, &result)) too_large();
    return result;
  }
  friend constexpr Size operator-(Size a, Size b) {
    if (b > a) throw std::invalid_argument("a size is negative");
    return a.value_ - b.value_;
  }
  friend constexpr Size operator*(Size a, Size b) {
    int64_t result = 0;
    if (__builtin_mul_overflow(a.value_, b.value_, &result)) too_large();
    return result;
  }

 private:
  [[noreturn]] static void too_large() { throw std::invalid_argument("a product or a sum of sizes is too large"); }

  int64_t value_ = 0;
};

// How many times `part`, which is not 0, goes into `whole`, rounded up.
constexpr Size ceil_div(Size whole, Size part) {
  return whole.value() / part.value() + (whole.value() % part.value() != 0 ? 1 : 0);
}

constexpr bool divides(Size part, Size whole) { return part != Size{0} && whole.value() % part.value() == 0; }

// Whether `width` columns from `offset` lie within `last` columns.
constexpr bool lies_within(Size last, Size offset, Size width) { return width <= last && offset <= last - width; }

// What attributes may state at most: a width, an offset or a number of rows; heads, groups, and the sizes of one head.
constexpr int64_t kMostWidth = INT32_MAX, kMostHeads = 1 << 16;

// Returns an attribute between `least` and `most`.
inline Size bounded(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    throw std::invalid_argument(std::string("attribute ") + name + " is " + std::to_string(value) + ", and must be " +
                                std::to_string(least) + " to " + std::to_string(most));
  }
  return value;
}

}  // namespace h1
