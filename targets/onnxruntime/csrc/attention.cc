// Attention(qkv [B, T, W], cos [B, T, D / 2], sin [B, T, D / 2], mask int64 [B, total], past_k [B, Hkv, P, D], past_v)
//   -> out [B, T, H * D], present_k [B, Hkv, max(P, total), D], present_v
//   Grouped-query causal attention, the half-split rotary embedding inside. The cache holds total - T tokens; the T new
//   ones go behind them. P >= total: a buffer of capacity P, extended in place where past and present are one memory.
//   Otherwise P = total - T, and present is a grown copy. Column c is visible to the token at column o if c <= o and
//   mask is not 0, or if c = o.
//   Caches are floats, halves, or int8 with D + D / 16 columns (cache_rows.h): new keys and values are rounded to nearest
//   before anything reads them. Scores and sums are floats.
//   Source: online softmax over blocks of keys, Dao et al., "FlashAttention" (2022); one token splits its context among
//   threads.
#include "attention.h"

#include <algorithm>
#include <type_traits>

#include "attention_one.h"
#include "attention_tile.h"
#include "ort.h"

namespace h1 {
namespace {

template <class T>
void attention(const Parallel& parallel, const Attention<T>& a) {
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
    Tile<T>(a, cache / a.kv_heads, cache % a.kv_heads, first, std::min(tokens, a.tokens - first)).run();
  });
}

// One op with caches of T; ONNX Runtime chooses by the dtype of a node's inputs.
template <class T>
class AttentionOp {
 public:
  static constexpr const char* name = "Attention";
  static constexpr bool has_scales = std::is_same_v<T, int8_t>;
  static constexpr Port cache = has_scales ? signed_bytes(4) : std::is_same_v<T, Half> ? halves(4) : floats(4);
  static constexpr Port inputs[] = {floats(3), floats(3), floats(3), integers(2), cache, cache};
  static constexpr Port outputs[] = {floats(3), cache, cache};

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
    require(!has_scales || divides(kScaled, dim_), "head_dim must be a multiple of 32 beside a cache in int8");
  }

  void compute(const Call& call) const {
    const auto qkv = call.input<float>(0);
    const auto cos = call.input<float>(1);
    const auto sin = call.input<float>(2);
    const auto mask = call.input<int64_t>(3);
    const auto past_k = call.input<T>(4);
    const auto past_v = call.input<T>(5);
    const Size batch = qkv.shape[0], tokens = qkv.shape[1], total = mask.shape[1], past_rows = past_k.shape[2];
    require(lies_within(qkv.last(), q_offset_, heads_ * dim_), "the columns of q lie outside qkv");
    require(lies_within(qkv.last(), std::max(k_offset_, v_offset_), kv_heads_ * dim_),
            "the columns of k or v lie outside qkv");
    for (const auto* table : {&cos, &sin}) {
      require(table->shape == Shape{batch, tokens, dim_.value() / 2}, "cos and sin must be [batch, tokens, dim / 2]");
    }
    const Size row = static_cast<int64_t>(stored<T>(dim_.count()));
    for (const auto* past : {&past_k, &past_v}) {
      require(past->shape == Shape{batch, kv_heads_, past_rows, row},
              has_scales ? "past must be [batch, kv_heads, rows, head_dim + head_dim / 16]"
                         : "past must be [batch, kv_heads, rows, head_dim]");
    }
    require(mask.shape[0] == batch && total >= tokens, "mask must be [batch, past + tokens]");
    require(past_rows >= total || past_rows == total - tokens,
            "past must hold the past exactly, or have room for all tokens");
    const Shape grown{batch, kv_heads_, std::max(past_rows, total), row};
    const auto out = call.output<float>(0, {batch, tokens, heads_ * dim_});
    const auto keys = call.output<T>(1, grown), values = call.output<T>(2, grown);
    if (keys.size() == Size{0}) return;  // no batch, or neither a past nor tokens
    const auto columns = [&qkv](Size offset) { return qkv.data == nullptr ? nullptr : qkv.from(offset); };
    const Attention<T> arguments{
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
  static const Op<AttentionOp<float>> op;
  return &op;
}

const OrtCustomOp* half_attention_op() {
  static const Op<AttentionOp<Half>> op;
  return &op;
}

const OrtCustomOp* int8_attention_op() {
  static const Op<AttentionOp<int8_t>> op;
  return &op;
}

}  // namespace h1
