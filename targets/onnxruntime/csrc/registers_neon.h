// Vectors of 256 bits on AArch64: two registers of 128, with the operators of the compilers' own vectors. Of those, GCC
// 12 keeps the ones of 256 bits in memory and in general registers there.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace h1 {

inline float32x4_t repeated(float x) { return vdupq_n_f32(x); }
inline int32x4_t repeated(int32_t x) { return vdupq_n_s32(x); }
inline int8x16_t repeated(int8_t x) { return vdupq_n_s8(x); }
inline uint8x16_t repeated(uint8_t x) { return vdupq_n_u8(x); }

// The elements of `lower`, then those of `upper`. An element beside a vector stands for a vector of it.
template <class Element, class Register>
struct Registers {
  using Truth = Registers<int32_t, int32x4_t>;  // of each element, for elements of 32 bits: -1 or 0

  Register lower, upper;

  Registers() = default;
  Registers(Element x) : lower(repeated(x)), upper(lower) {}
  Registers(Register of_lower, Register of_upper) : lower(of_lower), upper(of_upper) {}

  // Copied by halves: as one block of memory, they would not stay in registers.
  static Registers at(const void* p) {
    Registers v;
    std::memcpy(&v.lower, p, sizeof v.lower);
    std::memcpy(&v.upper, static_cast<const char*>(p) + sizeof v.lower, sizeof v.upper);
    return v;
  }
  void copy_to(void* p) const {
    std::memcpy(p, &lower, sizeof lower);
    std::memcpy(static_cast<char*>(p) + sizeof lower, &upper, sizeof upper);
  }

  Element operator[](size_t i) const {
    constexpr size_t kHalf = sizeof lower / sizeof(Element);
    return i < kHalf ? lower[i] : upper[i - kHalf];
  }

  friend Registers operator+(Registers a, Registers b) { return {a.lower + b.lower, a.upper + b.upper}; }
  friend Registers operator-(Registers a, Registers b) { return {a.lower - b.lower, a.upper - b.upper}; }
  friend Registers operator*(Registers a, Registers b) { return {a.lower * b.lower, a.upper * b.upper}; }
  friend Registers operator/(Registers a, Registers b) { return {a.lower / b.lower, a.upper / b.upper}; }
  friend Registers operator&(Registers a, Registers b) { return {a.lower & b.lower, a.upper & b.upper}; }
  friend Registers operator^(Registers a, Registers b) { return {a.lower ^ b.lower, a.upper ^ b.upper}; }
  friend Registers operator<<(Registers a, Registers b) { return {a.lower << b.lower, a.upper << b.upper}; }
  friend Registers operator>>(Registers a, Registers b) { return {a.lower >> b.lower, a.upper >> b.upper}; }
  friend Truth operator<(Registers a, Registers b) {
    return {(int32x4_t)(a.lower < b.lower), (int32x4_t)(a.upper < b.upper)};
  }
  friend Truth operator>(Registers a, Registers b) { return b < a; }
  Registers operator-() const { return {-lower, -upper}; }
  Registers& operator+=(Registers other) { return *this = *this + other; }
  Registers& operator*=(Registers other) { return *this = *this * other; }
};

using f32x8 = Registers<float, float32x4_t>;
using i32x8 = Registers<int32_t, int32x4_t>;
using s8x32 = Registers<int8_t, int8x16_t>;
using u8x32 = Registers<uint8_t, uint8x16_t>;

// b where a or b is NaN.
inline f32x8 max(f32x8 a, f32x8 b) {
  return {vbslq_f32(vcgtq_f32(a.lower, b.lower), a.lower, b.lower),
          vbslq_f32(vcgtq_f32(a.upper, b.upper), a.upper, b.upper)};
}
inline f32x8 min(f32x8 a, f32x8 b) {
  return {vbslq_f32(vcltq_f32(a.lower, b.lower), a.lower, b.lower),
          vbslq_f32(vcltq_f32(a.upper, b.upper), a.upper, b.upper)};
}
inline i32x8 max(i32x8 a, i32x8 b) { return {vmaxq_s32(a.lower, b.lower), vmaxq_s32(a.upper, b.upper)}; }

}  // namespace h1
