// What attention to one token and to several have in common: the arguments, the cache, and the online softmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cache_rows.h"
#include "elementary.h"
#include "gemm.h"
#include "parallel.h"

namespace h1 {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kLowest = -1e30f;  // below any score, but finite: exp(kHidden - kLowest) is 0

// T: of what the rows of keys and values consist, see cache_rows.h.
template <class T>
struct Attention {
  size_t batch, tokens, total, heads, kv_heads, dim, width, past_rows, rows;
  float scale;
  const float *q, *k, *v;  // at their first column
  const float *cos, *sin;
  const int64_t* mask;
  const T *past_k, *past_v;
  float* out;
  T *keys, *values;

  size_t past() const { return total - tokens; }
  size_t group() const { return heads / kv_heads; }
  size_t token(size_t b, size_t t) const { return b * tokens + t; }
  size_t cache(size_t b, size_t kv, size_t column) const {
    return ((b * kv_heads + kv) * rows + column) * stored<T>(dim);
  }
};

// Sets out to factor x, rotated: pairs are (i, i + dim / 2).
template <class T>
void rotate(const Attention<T>& a, size_t token, const float* x, float factor, float* out) {
  const size_t half = a.dim / 2;
  const float *cos = a.cos + token * half, *sin = a.sin + token * half;
  map(out, half,
      [&](size_t i, auto read) { return factor * (read(x + i) * read(cos + i) - read(x + half + i) * read(sin + i)); });
  map(out + half, half,
      [&](size_t i, auto read) { return factor * (read(x + half + i) * read(cos + i) + read(x + i) * read(sin + i)); });
}

// Writes the cache of one head: the past where it is elsewhere, then the new tokens.
template <class T>
void append(const Attention<T>& a, size_t b, size_t kv) {
  static thread_local Scratch<float> scratch;
  float* const key = scratch.get(a.dim);
  const size_t past = a.past_rows * stored<T>(a.dim), from = (b * a.kv_heads + kv) * past, to = a.cache(b, kv, 0);
  if (a.past_k != a.keys) std::copy_n(a.past_k + from, past, a.keys + to);
  if (a.past_v != a.values) std::copy_n(a.past_v + from, past, a.values + to);
  for (size_t t = 0; t < a.tokens; ++t) {
    const size_t column = a.token(b, t) * a.width + kv * a.dim, row = a.cache(b, kv, a.past() + t);
    rotate(a, a.token(b, t), a.k + column, 1, key);
    store_row(a.keys + row, key, a.dim);
    store_row(a.values + row, a.v + column, a.dim);
  }
}

// Writes the queries of `tokens` tokens that read one head of the cache, rotated and scaled: row t * group + g.
template <class T>
void gather_queries(const Attention<T>& a, size_t b, size_t kv, size_t first, size_t tokens, float* queries) {
  for (size_t t = first; t < first + tokens; ++t) {
    for (size_t h = kv * a.group(); h < (kv + 1) * a.group(); ++h, queries += a.dim) {
      rotate(a, a.token(b, t), a.q + a.token(b, t) * a.width + h * a.dim, a.scale, queries);
    }
  }
}

// Sets bias[i] to 0 where the mask shows column begin + i, to kHidden where not; returns how many it shows.
template <class T>
size_t read_mask(const Attention<T>& a, size_t b, size_t begin, size_t count, float* bias) {
  const int64_t* mask = a.mask + b * a.total + begin;
  size_t shown = 0;
  for (size_t i = 0; i < count; ++i) {
    bias[i] = mask[i] ? 0 : kHidden;
    shown += mask[i] != 0;
  }
  return shown;
}

// What one query has seen of its context so far: values weighted by exp(score - highest). The sum of weights is kept in
// lanes.
struct Seen {
  float highest = kLowest;
  f32x8 weights{};
};

// Turns the scores of `count` keys (a multiple of the lanes of V) into weights. Returns the factor that brings the row's
// sum of values so far to the new maximum: 1 for most blocks, which have no new one.
template <class V>
float normalise(size_t count, float* scores, Seen& seen) {
  V tops = load_as<V>(scores);
  for (size_t i = lanes<V>; i < count; i += lanes<V>) tops = max(tops, load_as<V>(scores + i));
  const f32x8 top = max_of_parts(tops);
  float factor = 1;
  if (any(top > seen.highest)) {
    const float before = seen.highest;
    for (size_t i = 0; i < kLanes; ++i) seen.highest = std::max(seen.highest, float(top[i]));
    factor = std::exp(before - seen.highest);
    seen.weights *= factor;
  }
  V weights{};
  for (size_t i = 0; i < count; i += lanes<V>) {
    const V weight = exp(load_as<V>(scores + i) - seen.highest);
    store_bytes(scores + i, weight);
    weights += weight;
  }
  seen.weights += sum_of_parts(weights);
  return factor;
}

}  // namespace h1
