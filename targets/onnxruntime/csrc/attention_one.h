// Attention of one token: its context is split among threads, and each number of the cache is read once for all heads
// that share it, as far as there are registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention.h"
#include "parallel.h"
#include "wide.h"

namespace h1 {

constexpr size_t kOneKeys = 64;  // keys of a block, whose scores are normalised together
constexpr size_t kSplit = 512;   // keys of one item for a thread

// Prefetches `count` numbers, which may be outside of what is allocated.
template <class T>
void prefetch(size_t count, const T* p) {
  for (size_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(p + i);
}

// The keys whose scores are one vector V for `Heads` heads.
template <class V, size_t Heads>
constexpr size_t kTile = lanes<V> / Heads;

// Returns queries[h] . keys[i] in lane h kTile + i.
template <class V, size_t Heads, class T>
inline V score(const float* queries, const T* keys, size_t dim) {
  constexpr size_t kCount = kTile<V, Heads>;
  using Part = Columns<V, T>;
  V products[lanes<V>] = {};
  for (size_t d = 0; d < dim; d += Part::width) {
    Part parts[kCount];
    for (size_t i = 0; i < kCount; ++i) parts[i] = Part::of(keys + i * stored<T>(dim), dim, d);
    for (size_t j = 0; j < Part::width; j += lanes<V>) {
      V key[kCount];
      for (size_t i = 0; i < kCount; ++i) key[i] = parts[i].vector(j);
      for (size_t h = 0; h < Heads; ++h) {
        const V query = load_as<V>(queries + h * dim + d + j);
        for (size_t i = 0; i < kCount; ++i) products[h * kCount + i] += query * key[i];
      }
    }
  }
  return sums(products);
}

// Sets scores[h][i] of `count` keys; `last` has room for the keys of a tile, and no key is read behind the last. What is
// read next, the values of these keys and the keys behind them, is on its way meanwhile.
template <class V, size_t Heads, class T>
void scores_of(const float* queries, const T* keys, size_t count, size_t dim, T* last, float* scores, const T* values) {
  constexpr size_t kCount = kTile<V, Heads>;
  const size_t row = stored<T>(dim);
  for (size_t i = 0; i < count; i += kCount) {
    const T* tile = keys + i * row;
    prefetch(kCount * row, values + i * row);
    prefetch(kCount * row, tile + kOneKeys * row);
    if (count - i < kCount) {
      std::fill(std::copy_n(tile, (count - i) * row, last), last + kCount * row, T{});
      tile = last;
    }
    const V found = score<V, Heads>(queries, tile, dim);
    float of_head[lanes<V>];
    std::memcpy(of_head, &found, sizeof found);
    for (size_t h = 0; h < Heads; ++h) std::copy_n(of_head + h * kCount, kCount, scores + h * kOneKeys + i);
  }
}

// sums[h] = factors[h] sums[h] + the values weighted by weights[h], for `Vectors` vectors of columns from `column` on,
// which their width divides.
template <class V, size_t Heads, size_t Vectors, class T>
inline void weigh(const float* weights, const T* values, size_t count, size_t dim, const float* factors, float* sums,
                  size_t column) {
  constexpr size_t kWidth = Vectors * lanes<V>, kPart = std::min(kWidth, Columns<V, T>::width);
  V sum[Heads][Vectors] = {};
  for (size_t i = 0; i < count; ++i) {
    V value[Vectors];
    for (size_t start = 0; start < kWidth; start += kPart) {
      const auto part = Columns<V, T>::of(values + i * stored<T>(dim), dim, column + start);
      for (size_t d = 0; d < kPart; d += lanes<V>) value[(start + d) / lanes<V>] = part.vector(d);
    }
    for (size_t h = 0; h < Heads; ++h) {
      for (size_t j = 0; j < Vectors; ++j) sum[h][j] += weights[h * kOneKeys + i] * value[j];
    }
  }
  H1_UNROLL
  for (size_t h = 0; h < Heads; ++h) {
    H1_UNROLL
    for (size_t j = 0; j < Vectors; ++j) {
      float* out = sums + h * dim + column + j * lanes<V>;
      const V all = factors[h] * load_as<V>(out) + sum[h][j];
      store_bytes(out, all);
    }
  }
}

// The same for all columns: as many vectors at a time as there are registers, then fewer.
template <class V, size_t Heads, size_t Vectors, class T>
void weigh_all(const float* weights, const T* values, size_t count, size_t dim, const float* factors, float* sums,
               size_t column = 0) {
  for (; column + Vectors * lanes<V> <= dim; column += Vectors * lanes<V>) {
    weigh<V, Heads, Vectors>(weights, values, count, dim, factors, sums, column);
  }
  if constexpr (Vectors > 1) {
    if (column < dim) weigh_all<V, Heads, Vectors / 2>(weights, values, count, dim, factors, sums, column);
  }
}

// Calls body(heads, first) for `group` heads in fours, then a two, then a one; heads is a constant.
template <class Body>
void in_fours(size_t group, const Body& body) {
  size_t first = 0;
  for (; first + 4 <= group; first += 4) body(std::integral_constant<size_t, 4>(), first);
  if (first + 2 <= group) body(std::integral_constant<size_t, 2>(), first), first += 2;
  if (first < group) body(std::integral_constant<size_t, 1>(), first);
}

// Attends one token to the columns [begin, end) of its context: what each head of the group has seen, and its sum of
// values. V divides the width of a head.
template <class V, class T>
void attend_split(const Attention<T>& a, size_t b, size_t kv, size_t begin, size_t end, Seen* seen, float* sums) {
  static thread_local Scratch<float> scratch;
  static thread_local Scratch<T> last_keys;
  const size_t group = a.group();
  float* queries = scratch.get(group * a.dim + group * (kOneKeys + 1) + kOneKeys);
  float *scores = queries + group * a.dim, *bias = scores + group * kOneKeys, *factors = bias + kOneKeys;
  T* last = last_keys.get(lanes<V> * stored<T>(a.dim));
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
    std::fill(bias + count, bias + padded, kHidden);
    in_fours(group, [&](auto heads, size_t g) {
      scores_of<V, heads>(queries + g * a.dim, keys, count, a.dim, last, scores + g * kOneKeys, values);
    });
    for (size_t g = 0; g < group; ++g) {
      float* row = scores + g * kOneKeys;
      std::fill(row + count, row + padded, 0.0f);  // a tile has less than kLanes, and an earlier call may have left NaN
      for (size_t i = 0; i < padded; i += kLanes) store(row + i, load(row + i) + load(bias + i));
      factors[g] = normalise<f32x8>(padded, row, seen[g]);
    }
    in_fours(group, [&](auto heads, size_t g) {
      weigh_all<V, heads, lanes<V> / heads>(scores + g * kOneKeys, values, count, a.dim, factors + g, sums + g * a.dim);
    });
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
  auto attend = attend_split<f32x8, T>;
#if defined(H1_AVX512)
  if (a.dim % lanes<f32x16> == 0) attend = attend_split<f32x16, T>;
#endif
  std::vector<size_t> first(a.batch);
  for (size_t b = 0; b < a.batch; ++b) first[b] = first_shown(a, b);
  const size_t splits = (a.total - *std::min_element(first.begin(), first.end()) + kSplit - 1) / kSplit;
  std::vector<Seen> seen(a.batch * a.kv_heads * splits * group);
  std::vector<float> sums(seen.size() * a.dim);
  parallel(a.batch * a.kv_heads * splits, [&](size_t i) {
    const size_t b = i / splits / a.kv_heads, kv = i / splits % a.kv_heads, at = i * group;
    const size_t begin = first[b] + i % splits * kSplit, end = std::min(a.total, begin + kSplit);
    if (begin < end) attend(a, b, kv, begin, end, &seen[at], &sums[at * a.dim]);
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
