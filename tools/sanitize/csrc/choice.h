// Where a node's random choices come from: a fuzzer's bytes, or the numbers of a seed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <random>

class Choice {
 public:
  explicit Choice(uint64_t seed) : numbers_(seed), random_(true) {}
  Choice(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  // 0 to count - 1; 0 behind a fuzzer's last byte.
  uint64_t below(uint64_t count) { return next() % count; }
  bool one_in(uint64_t count) { return below(count) == count - 1; }
  int64_t of(std::initializer_list<int64_t> values) { return values.begin()[below(values.size())]; }
  float real() { return static_cast<float>(static_cast<int64_t>(below(2001)) - 1000) / 500; }

 private:
  uint64_t next() {
    if (random_) return numbers_();
    uint64_t value = 0;
    for (int i = 0; i < 2 && left_ > 0; ++i, --left_) value = value << 8 | *data_++;
    return value;
  }

  const uint8_t* data_ = nullptr;
  size_t left_ = 0;
  std::mt19937_64 numbers_;
  bool random_ = false;
};
