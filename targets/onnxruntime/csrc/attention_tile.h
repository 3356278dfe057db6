// Attention of several tokens: blocks of keys against tiles of queries.
#pragma once

#include <algorithm>

#include "attention.h"
#include "parallel.h"

namespace h1 {

constexpr size_t kKeys = 64;             // keys of a block: they and their values stay in the L1 or L2 cache
constexpr size_t kQueries = 264;         // rows (tokens times heads of a group) of one item for a thread
constexpr size_t kScores = lanes<Wide>;  // keys whose scores a vector holds
constexpr size_t kRows = kTileRows;      // rows whose scores are computed, normalised and used at a time

// Several tokens, one head of the cache: blocks of keys against rows of queries.
template <class T>
class Tile {
 public:
  Tile(const Attention<T>& a, size_t b, size_t kv, size_t first, size_t tokens)
      : a_(a), b_(b), kv_(kv), first_(first), tokens_(tokens), group_(a.group()), rows_(tokens * group_) {
    static thread_local Scratch<float> scratch;
    static thread_local Scratch<Seen> seen;
    queries_ = scratch.get(2 * rows_ * a.dim + kKeys * (a.dim + kRows + 1) + widened<T>(kKeys * a.dim));
    sums_ = queries_ + rows_ * a.dim;
    keys_ = sums_ + rows_ * a.dim;
    scores_ = keys_ + kKeys * a.dim;
    bias_ = scores_ + kRows * kKeys;
    floats_ = bias_ + kKeys;
    seen_ = seen.get(rows_);
  }

  void run() {
    gather_queries(a_, b_, kv_, first_, tokens_, queries_);
    std::fill_n(sums_, rows_ * a_.dim, 0.0f);
    std::fill_n(seen_, rows_, Seen{});
    const size_t end = own(rows_ - 1) + 1;
    for (size_t start = 0; start < end; start += kKeys) block(start, std::min(kKeys, end - start));
    for (size_t row = 0; row < rows_; ++row) {
      const size_t g = row % group_, t = first_ + row / group_;
      float* out = a_.out + (a_.token(b_, t) * a_.heads + kv_ * group_ + g) * a_.dim;
      const float weights = sum(seen_[row].weights);
      for (size_t d = 0; d < a_.dim; ++d) out[d] = sums_[row * a_.dim + d] / weights;
    }
  }

 private:
  size_t own(size_t row) const { return a_.past() + first_ + row / group_; }  // its token's column

  void block(size_t start, size_t count) {
    const size_t shown = read_mask(a_, b_, start, count, bias_);
    if (shown == 0 && start + count <= own(0)) return;
    const size_t at = a_.cache(b_, kv_, start);
    transpose_rows(a_.keys + at, count, a_.dim, keys_, kKeys);
    const float* const values = as_floats(a_.values + at, count, a_.dim, floats_);
    for (size_t row = 0; row < rows_; row += kRows) {
      const size_t rows = std::min(kRows, rows_ - row), last = own(row + rows - 1);
      if (last < start) continue;
      const size_t seen = std::min(count, last + 1 - start), padded = (seen + kScores - 1) / kScores * kScores;
      const Strided queries{.data = queries_ + row * a_.dim, .row = a_.dim, .column = 1};
      gemm(rows, padded, a_.dim, queries, keys_, kKeys, scores_, kKeys, nullptr);
      float factors[kRows];
      for (size_t i = 0; i < rows; ++i) {
        hide(row + i, start, count, padded, shown < count, scores_ + i * kKeys);
        factors[i] = normalise<Wide>(padded, scores_ + i * kKeys, seen_[row + i]);
      }
      const Strided weights{.data = scores_, .row = kKeys, .column = 1};
      gemm(rows, a_.dim, seen, weights, values, a_.dim, sums_ + row * a_.dim, a_.dim, factors);
    }
  }

  // Sets to kHidden what the row must not see of a block, up to `padded` columns.
  void hide(size_t row, size_t start, size_t count, size_t padded, bool pads, float* scores) const {
    const size_t visible = own(row) < start ? 0 : std::min(count, own(row) + 1 - start);
    if (pads) {
      const bool own_here = own(row) - start < count;  // false too where own(row) < start, by wrapping around
      const float self = own_here ? scores[own(row) - start] : 0;
      for (size_t i = 0; i < visible; ++i) scores[i] += bias_[i];
      if (own_here) scores[own(row) - start] = self;
    }
    std::fill(scores + std::min(visible, padded), scores + padded, kHidden);
  }

  const Attention<T>& a_;
  const size_t b_, kv_, first_, tokens_, group_, rows_;
  float *queries_, *sums_, *keys_, *scores_, *bias_, *floats_;
  Seen* seen_;
};

}  // namespace h1
