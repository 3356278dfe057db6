// Attention of one token: its context is split among threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention.h"
#include "parallel.h"

namespace h1 {

constexpr size_t kOneKeys = 32;   // keys of a block: the heads of a group read them again from the L1 cache
constexpr size_t kSplit = 512;    // keys of one item for a thread

// Returns the sum of v[i]'s lanes in lane i.
inline f32x8 sums(const f32x8 (&v)[kLanes]) {
#if defined(H1_AVX2)
  const auto add = [](f32x8 a, f32x8 b) { return f32x8(_mm256_hadd_ps(__m256(a), __m256(b))); };
  const f32x8 low = add(add(v[0], v[1]), add(v[2], v[3])), high = add(add(v[4], v[5]), add(v[6], v[7]));
  return f32x8(_mm256_permute2f128_ps(__m256(low), __m256(high), 0x20)) +
         f32x8(_mm256_permute2f128_ps(__m256(low), __m256(high), 0x31));
#else
  return f32x8{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3]), sum(v[4]), sum(v[5]), sum(v[6]), sum(v[7])};
#endif
}

// Prefetches `count` numbers, which may be outside of what is allocated.
template <class T>
void prefetch(size_t count, const T* p) {
  for (size_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(p + i);
}

// Returns query . keys[i] for kLanes keys.
inline f32x8 score(const float* query, const float* keys, size_t dim) {
  f32x8 products[kLanes] = {};
  for (size_t d = 0; d < dim; d += kLanes) {
    const f32x8 part = load(query + d);
    for (size_t i = 0; i < kLanes; ++i) products[i] += part * load(keys + i * dim + d);
  }
  return sums(products);
}

// Attends one token to the columns [begin, end) of its context: what each head of the group has seen, and its sum of
// values.
template <class T>
void attend_split(const Attention<T>& a, size_t b, size_t kv, size_t begin, size_t end, Seen* seen, float* sums) {
  static thread_local Scratch<float> scratch;
  const size_t group = a.group();
  const size_t block = kOneKeys * a.dim;
  float* queries = scratch.get((group + kLanes) * a.dim + group * (kOneKeys + 1) + kOneKeys + widened<T>(block));
  float *last_keys = queries + group * a.dim, *floats = last_keys + kLanes * a.dim, *scores = floats + widened<T>(block);
  float *bias = scores + group * kOneKeys, *factors = bias + kOneKeys;
  gather_queries(a, b, kv, 0, 1, queries);
  std::fill_n(seen, group, Seen{});
  std::fill_n(sums, group * a.dim, 0.0f);
  for (size_t start = begin; start < end; start += kOneKeys) {
    const size_t count = std::min(kOneKeys, end - start), padded = (count + kLanes - 1) / kLanes * kLanes;
    const T *keys = a.keys + a.cache(b, kv, start), *values = a.values + a.cache(b, kv, start);
    size_t shown = read_mask(a, b, start, count, bias);
    if (start + count == a.total && bias[count - 1] != 0) {  // the token itself
      bias[count - 1] = 0;
      ++shown;
    }
    if (shown == 0) continue;
    const size_t rest = count % kLanes, whole = count - rest;
    if (rest) {  // no key may be read behind the last
      std::fill_n(last_keys, kLanes * a.dim, 0.0f);
      std::copy_n(as_floats(keys + whole * a.dim, rest * a.dim, floats), rest * a.dim, last_keys);
      std::fill(bias + count, bias + padded, kHidden);
    }
    const float* wide = nullptr;  // the keys in float32
    for (size_t g = 0; g < group; ++g) {
      const float* query = queries + g * a.dim;
      float* row = scores + g * kOneKeys;
      for (size_t i = 0; i < whole; i += kLanes) {
        if (g == 0) {
          prefetch(a.dim * kLanes, values + i * a.dim);
          prefetch(a.dim * kLanes, keys + (kOneKeys + i) * a.dim);
          wide = as_floats(keys + i * a.dim, a.dim * kLanes, floats + i * a.dim) - i * a.dim;
        }
        store(row + i, load(bias + i) + score(query, wide + i * a.dim, a.dim));
      }
      if (rest) store(row + whole, load(bias + whole) + score(query, last_keys, a.dim));
      factors[g] = normalise(padded, row, seen[g]);
    }
    const Strided weights{.data = scores, .row = kOneKeys, .column = 1};
    gemm(group, a.dim, count, weights, as_floats(values, count * a.dim, floats), a.dim, sums, a.dim, factors);
  }
}

// Returns the first column that the mask shows, or the token's own one.
template <class T>
size_t first_shown(const Attention<T>& a, size_t b) {
  const int64_t* mask = a.mask + b * a.total;
  return static_cast<size_t>(std::find_if(mask, mask + a.total - 1, [](int64_t shown) { return shown != 0; }) - mask);
}

// Attends one token: every head of the cache and split of the context is an item, then the splits are brought to one
// maximum and added. Splits are counted from the first column shown, so that a row's sums do not depend on its pads.
template <class T>
void attend_one(const Parallel& parallel, const Attention<T>& a) {
  const size_t group = a.group();
  std::vector<size_t> first(a.batch);
  for (size_t b = 0; b < a.batch; ++b) first[b] = first_shown(a, b);
  const size_t splits = (a.total - *std::min_element(first.begin(), first.end()) + kSplit - 1) / kSplit;
  std::vector<Seen> seen(a.batch * a.kv_heads * splits * group);
  std::vector<float> sums(seen.size() * a.dim);
  parallel(a.batch * a.kv_heads * splits, [&](size_t i) {
    const size_t b = i / splits / a.kv_heads, kv = i / splits % a.kv_heads, at = i * group;
    const size_t begin = first[b] + i % splits * kSplit, end = std::min(a.total, begin + kSplit);
    if (begin < end) attend_split(a, b, kv, begin, end, &seen[at], &sums[at * a.dim]);
  });
  for (size_t h = 0; h < a.batch * a.heads; ++h) {
    const size_t from = h / group * splits * group + h % group;
    const size_t used = (a.total - first[h / a.heads] + kSplit - 1) / kSplit;
    float highest = kLowest, weights = 0, *out = a.out + h * a.dim;
    for (size_t i = 0; i < used; ++i) highest = std::max(highest, seen[from + i * group].highest);
    std::fill_n(out, a.dim, 0.0f);
    for (size_t i = 0; i < used; ++i) {
      const size_t part = from + i * group;
      const float factor = std::exp(seen[part].highest - highest);
      weights += factor * sum(seen[part].weights);
      for (size_t d = 0; d < a.dim; ++d) out[d] += factor * sums[part * a.dim + d];
    }
    for (size_t d = 0; d < a.dim; ++d) out[d] /= weights;
  }
}

}  // namespace h1
