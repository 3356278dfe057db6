// Elementary functions over any vector of floats of wide.h.
#pragma once

#include "wide.h"

namespace h1 {

// exp(x) within 1e-7 relative error; 0 below -87.7, where results would soon be subnormal, and exp(88.37) above 88.37.
template <class V>
inline V exp(V x) {
  x = max(V{} + -88.3365447505f, min(V{} + 88.3762626647950f, x));  // in this order NaN stays NaN
  // x = n log 2 + r with |r| <= log(2) / 2: adding and subtracting 1.5 * 2^23 rounds to an integer
  const V round = V{} + 12582912.0f;
  const V n = (x * 1.44269504088896341f + round) - round;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts, the first exact in n's products
  V p = V{} + 1.9875691500e-4f;                             // Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const auto exponent = to_int(n) + 127;
  const auto power = max(exponent, decltype(to_int(n)){}) << 23;  // 2^n, and 0 for what would be subnormal
  return p * float_of_bits(power);
}

template <class V>
inline V silu(V x) {
  return x / (1.0f + exp(-x));
}

}  // namespace h1
