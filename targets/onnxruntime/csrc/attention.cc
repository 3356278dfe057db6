// Attention(qkv [B, T, W], cos [B, T, D / 2], sin [B, T, D / 2], mask int64 [B, total], past_k [B, Hkv, P, D], past_v)
//   -> out [B, T, H * D], present_k [B, Hkv, max(P, total), D], present_v
//   Grouped-query causal attention, the half-split rotary embedding inside. The cache holds total - T tokens; the T new
//   ones go behind them. P >= total: a buffer of capacity P, extended in place where past and present are one memory.
//   Otherwise P = total - T, and present is a grown copy. Column c is visible to the token at column o if c <= o and
//   mask is not 0, or if c = o.
//   Source: online softmax over blocks of keys, Dao et al., "FlashAttention" (2022); one token splits its context among
//   threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gemm.h"
#include "ort.h"

namespace h1 {
namespace {

constexpr size_t kKeys = 64;      // keys of a block: they and their values stay in the L1 or L2 cache
constexpr size_t kOneKeys = 32;   // the same for one token: the heads of a group read them again from the L1 cache
constexpr size_t kSplit = 512;    // keys of one item for a thread, for one token
constexpr size_t kQueries = 264;  // rows (tokens times heads of a group) of one item for a thread, for several tokens
constexpr size_t kRows = kTileRows;  // rows whose scores are computed, normalised and used at a time
constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kLowest = -1e30f;  // below any score, but finite: exp(kHidden - kLowest) is 0

struct Attention {
  size_t batch, tokens, total, heads, kv_heads, dim, width, past_rows, rows;
  float scale;
  const float *q, *k, *v;  // at their first column
  const float *cos, *sin;
  const int64_t* mask;
  const float *past_k, *past_v;
  float *out, *keys, *values;

  size_t past() const { return total - tokens; }
  size_t group() const { return heads / kv_heads; }
  size_t token(size_t b, size_t t) const { return b * tokens + t; }
  size_t cache(size_t b, size_t kv, size_t column) const { return ((b * kv_heads + kv) * rows + column) * dim; }
};

// Sets out to factor x, rotated: pairs are (i, i + dim / 2).
void rotate(const Attention& a, size_t token, const float* x, float factor, float* out) {
  const size_t half = a.dim / 2;
  const float *cos = a.cos + token * half, *sin = a.sin + token * half;
  map(out, half,
      [&](size_t i, auto read) { return factor * (read(x + i) * read(cos + i) - read(x + half + i) * read(sin + i)); });
  map(out + half, half,
      [&](size_t i, auto read) { return factor * (read(x + half + i) * read(cos + i) + read(x + i) * read(sin + i)); });
}

// Writes the cache of one head: the past where it is elsewhere, then the new tokens.
void append(const Attention& a, size_t b, size_t kv) {
  const size_t from = (b * a.kv_heads + kv) * a.past_rows * a.dim, to = a.cache(b, kv, 0);
  if (a.past_k != a.keys) std::copy_n(a.past_k + from, a.past_rows * a.dim, a.keys + to);
  if (a.past_v != a.values) std::copy_n(a.past_v + from, a.past_rows * a.dim, a.values + to);
  for (size_t t = 0; t < a.tokens; ++t) {
    const size_t column = a.token(b, t) * a.width + kv * a.dim, row = a.cache(b, kv, a.past() + t);
    rotate(a, a.token(b, t), a.k + column, 1, a.keys + row);
    std::copy_n(a.v + column, a.dim, a.values + row);
  }
}

// Writes the queries of `tokens` tokens that read one head of the cache, rotated and scaled: row t * group + g.
void gather_queries(const Attention& a, size_t b, size_t kv, size_t first, size_t tokens, float* queries) {
  for (size_t t = first; t < first + tokens; ++t) {
    for (size_t h = kv * a.group(); h < (kv + 1) * a.group(); ++h, queries += a.dim) {
      rotate(a, a.token(b, t), a.q + a.token(b, t) * a.width + h * a.dim, a.scale, queries);
    }
  }
}

// Sets bias[i] to 0 where the mask shows column begin + i, to kHidden where not; returns how many it shows.
size_t read_mask(const Attention& a, size_t b, size_t begin, size_t count, float* bias) {
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

// Turns the scores of `count` keys (a multiple of kLanes) into weights. Returns the factor that brings the row's sum of
// values so far to the new maximum: 1 for most blocks, which have no new one.
float normalise(size_t count, float* scores, Seen& seen) {
  f32x8 top = load(scores);
  for (size_t i = kLanes; i < count; i += kLanes) top = max(top, load(scores + i));
  float factor = 1;
  if (any(top > seen.highest)) {
    const float before = seen.highest;
    for (size_t i = 0; i < kLanes; ++i) seen.highest = std::max(seen.highest, float(top[i]));
    factor = std::exp(before - seen.highest);
    seen.weights *= factor;
  }
  for (size_t i = 0; i < count; i += kLanes) {
    const f32x8 weight = exp(load(scores + i) - seen.highest);
    store(scores + i, weight);
    seen.weights += weight;
  }
  return factor;
}

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

// Prefetches `count` floats, which may be outside of what is allocated.
inline void prefetch(size_t count, const float* p) {
  for (size_t i = 0; i < count; i += 64 / sizeof(float)) __builtin_prefetch(p + i);
}

// Returns query . keys[i] for kLanes keys.
f32x8 score(const float* query, const float* keys, size_t dim) {
  f32x8 products[kLanes] = {};
  for (size_t d = 0; d < dim; d += kLanes) {
    const f32x8 part = load(query + d);
    for (size_t i = 0; i < kLanes; ++i) products[i] += part * load(keys + i * dim + d);
  }
  return sums(products);
}

// Attends one token to the columns [begin, end) of its context: what each head of the group has seen, and its sum of
// values.
void attend_split(const Attention& a, size_t b, size_t kv, size_t begin, size_t end, Seen* seen, float* sums) {
  static thread_local Scratch<float> scratch;
  const size_t group = a.group();
  float* queries = scratch.get((group + kLanes) * a.dim + group * (kOneKeys + 1) + kOneKeys);
  float *last_keys = queries + group * a.dim, *scores = last_keys + kLanes * a.dim;
  float *bias = scores + group * kOneKeys, *factors = bias + kOneKeys;
  gather_queries(a, b, kv, 0, 1, queries);
  std::fill_n(seen, group, Seen{});
  std::fill_n(sums, group * a.dim, 0.0f);
  for (size_t start = begin; start < end; start += kOneKeys) {
    const size_t count = std::min(kOneKeys, end - start), padded = (count + kLanes - 1) / kLanes * kLanes;
    const float *keys = a.keys + a.cache(b, kv, start), *values = a.values + a.cache(b, kv, start);
    size_t shown = read_mask(a, b, start, count, bias);
    if (start + count == a.total && bias[count - 1] != 0) {  // the token itself
      bias[count - 1] = 0;
      ++shown;
    }
    if (shown == 0) continue;
    const size_t rest = count % kLanes, whole = count - rest;
    if (rest) {  // no key may be read behind the last
      std::fill_n(last_keys, kLanes * a.dim, 0.0f);
      std::copy_n(keys + whole * a.dim, rest * a.dim, last_keys);
      std::fill(bias + count, bias + padded, kHidden);
    }
    for (size_t g = 0; g < group; ++g) {
      const float* query = queries + g * a.dim;
      float* row = scores + g * kOneKeys;
      for (size_t i = 0; i < whole; i += kLanes) {
        if (g == 0) {
          prefetch(a.dim * kLanes, values + i * a.dim);
          prefetch(a.dim * kLanes, keys + (kOneKeys + i) * a.dim);
        }
        store(row + i, load(bias + i) + score(query, keys + i * a.dim, a.dim));
      }
      if (rest) store(row + whole, load(bias + whole) + score(query, last_keys, a.dim));
      factors[g] = normalise(padded, row, seen[g]);
    }
    const Strided weights{.data = scores, .row = kOneKeys, .column = 1};
    gemm(group, a.dim, count, weights, values, a.dim, sums, a.dim, factors);
  }
}

// Returns the first column that the mask shows, or the token's own one.
size_t first_shown(const Attention& a, size_t b) {
  const int64_t* mask = a.mask + b * a.total;
  return static_cast<size_t>(std::find_if(mask, mask + a.total - 1, [](int64_t shown) { return shown != 0; }) - mask);
}

// Attends one token: every head of the cache and split of the context is an item, then the splits are brought to one
// maximum and added. Splits are counted from the first column shown, so that a row's sums do not depend on its pads.
void attend_one(const Parallel& parallel, const Attention& a) {
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

// Several tokens, one head of the cache: blocks of keys against rows of queries.
class Tile {
 public:
  Tile(const Attention& a, size_t b, size_t kv, size_t first, size_t tokens)
      : a_(a), b_(b), kv_(kv), first_(first), tokens_(tokens), rows_(tokens * a.group()) {
    static thread_local Scratch<float> scratch;
    static thread_local Scratch<Seen> seen;
    queries_ = scratch.get(2 * rows_ * a.dim + kKeys * (a.dim + kRows + 1));
    sums_ = queries_ + rows_ * a.dim;
    keys_ = sums_ + rows_ * a.dim;
    scores_ = keys_ + kKeys * a.dim;
    bias_ = scores_ + kRows * kKeys;
    seen_ = seen.get(rows_);
  }

  void run() {
    gather_queries(a_, b_, kv_, first_, tokens_, queries_);
    std::fill_n(sums_, rows_ * a_.dim, 0.0f);
    std::fill_n(seen_, rows_, Seen{});
    const size_t end = own(rows_ - 1) + 1;
    for (size_t start = 0; start < end; start += kKeys) block(start, std::min(kKeys, end - start));
    for (size_t row = 0; row < rows_; ++row) {
      const size_t g = row % a_.group(), t = first_ + row / a_.group();
      float* out = a_.out + (a_.token(b_, t) * a_.heads + kv_ * a_.group() + g) * a_.dim;
      const float weights = sum(seen_[row].weights);
      for (size_t d = 0; d < a_.dim; ++d) out[d] = sums_[row * a_.dim + d] / weights;
    }
  }

 private:
  size_t own(size_t row) const { return a_.past() + first_ + row / a_.group(); }  // its token's column

  void block(size_t start, size_t count) {
    const size_t shown = read_mask(a_, b_, start, count, bias_);
    if (shown == 0 && start + count <= own(0)) return;
    const float *keys = a_.keys + a_.cache(b_, kv_, start), *values = a_.values + a_.cache(b_, kv_, start);
    for (size_t d = 0; d < a_.dim; ++d) {  // transposed, so that gemm's vectors run over keys
      for (size_t i = 0; i < count; ++i) keys_[d * kKeys + i] = keys[i * a_.dim + d];
      std::fill(keys_ + d * kKeys + count, keys_ + (d + 1) * kKeys, 0.0f);
    }
    for (size_t row = 0; row < rows_; row += kRows) {
      const size_t rows = std::min(kRows, rows_ - row), last = own(row + rows - 1);
      if (last < start) continue;
      const size_t seen = std::min(count, last + 1 - start), padded = (seen + kLanes - 1) / kLanes * kLanes;
      const Strided queries{.data = queries_ + row * a_.dim, .row = a_.dim, .column = 1};
      gemm(rows, padded, a_.dim, queries, keys_, kKeys, scores_, kKeys, nullptr);
      float factors[kRows];
      for (size_t i = 0; i < rows; ++i) {
        hide(row + i, start, count, padded, shown < count, scores_ + i * kKeys);
        factors[i] = normalise(padded, scores_ + i * kKeys, seen_[row + i]);
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

  const Attention& a_;
  const size_t b_, kv_, first_, tokens_, rows_;
  float *queries_, *sums_, *keys_, *scores_, *bias_;
  Seen* seen_;
};

void attention(const Parallel& parallel, const Attention& a) {
  const size_t caches = a.batch * a.kv_heads;
  const bool little = a.tokens == 1 && a.past_k == a.keys && a.past_v == a.values;  // too little for several threads
  parallel_ranges(parallel, caches, little ? caches : 1, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) append(a, i / a.kv_heads, i % a.kv_heads);
  });
  if (a.tokens == 1) return attend_one(parallel, a);
  const size_t tokens = std::max<size_t>(1, kQueries / a.group()), tiles = (a.tokens + tokens - 1) / tokens;
  parallel(caches * tiles, [&](size_t i) {
    const size_t cache = i % caches;
    const size_t first = (tiles - 1 - i / caches) * tokens;  // the last tiles see most: they go first
    Tile(a, cache / a.kv_heads, cache % a.kv_heads, first, std::min(tokens, a.tokens - first)).run();
  });
}

class AttentionOp {
 public:
  static constexpr const char* name = "Attention";
  static constexpr Port inputs[] = {floats(3), floats(3), floats(3), integers(2), floats(4), floats(4)};
  static constexpr Port outputs[] = {floats(3), floats(4), floats(4)};

  explicit AttentionOp(const Attributes& attributes)
      : heads_(attributes.size("num_heads", kMostHeads)),
        kv_heads_(attributes.size("kv_heads", kMostHeads)),
        dim_(attributes.size("head_dim", kMostHeads)),
        q_offset_(attributes.offset("q_offset")),
        k_offset_(attributes.offset("k_offset")),
        v_offset_(attributes.offset("v_offset")),
        scale_(attributes.finite("scale")) {
    require(divides(kv_heads_, heads_), "kv_heads must divide num_heads");
    require(divides(kLanes, dim_), "head_dim must be a multiple of 8");
  }

  void compute(const Call& call) const {
    const auto qkv = call.input<float>(0);
    const auto cos = call.input<float>(1);
    const auto sin = call.input<float>(2);
    const auto mask = call.input<int64_t>(3);
    const auto past_k = call.input<float>(4);
    const auto past_v = call.input<float>(5);
    const Size batch = qkv.shape[0], tokens = qkv.shape[1], total = mask.shape[1], past_rows = past_k.shape[2];
    require(lies_within(qkv.last(), q_offset_, heads_ * dim_), "the columns of q lie outside qkv");
    require(lies_within(qkv.last(), std::max(k_offset_, v_offset_), kv_heads_ * dim_),
            "the columns of k or v lie outside qkv");
    for (const auto* table : {&cos, &sin}) {
      require(table->shape == Shape{batch, tokens, dim_.value() / 2}, "cos and sin must be [batch, tokens, dim / 2]");
    }
    for (const auto* past : {&past_k, &past_v}) {
      require(past->shape == Shape{batch, kv_heads_, past_rows, dim_},
              "past must be [batch, kv_heads, rows, head_dim]");
    }
    require(mask.shape[0] == batch && total >= tokens, "mask must be [batch, past + tokens]");
    require(past_rows >= total || past_rows == total - tokens,
            "past must hold the past exactly, or have room for all tokens");
    const Shape grown{batch, kv_heads_, std::max(past_rows, total), dim_};
    const auto out = call.output<float>(0, {batch, tokens, heads_ * dim_});
    const auto keys = call.output<float>(1, grown), values = call.output<float>(2, grown);
    if (keys.size() == Size{0}) return;  // no batch, or neither a past nor tokens
    const auto columns = [&qkv](Size offset) { return qkv.data == nullptr ? nullptr : qkv.from(offset); };
    const Attention arguments{
        .batch = batch.count(),
        .tokens = tokens.count(),
        .total = total.count(),
        .heads = heads_.count(),
        .kv_heads = kv_heads_.count(),
        .dim = dim_.count(),
        .width = qkv.last().count(),
        .past_rows = past_rows.count(),
        .rows = grown[2].count(),
        .scale = scale_,
        .q = columns(q_offset_),
        .k = columns(k_offset_),
        .v = columns(v_offset_),
        .cos = cos.data,
        .sin = sin.data,
        .mask = mask.data,
        .past_k = past_k.data,
        .past_v = past_v.data,
        .out = out.data,
        .keys = keys.data,
        .values = values.data,
    };
    attention(call.parallel, arguments);
  }

 private:
  Size heads_, kv_heads_, dim_, q_offset_, k_offset_, v_offset_;
  float scale_;
};

}  // namespace

const OrtCustomOp* attention_op() {
  static const Op<AttentionOp> op;
  return &op;
}

}  // namespace h1
