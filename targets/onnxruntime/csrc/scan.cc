// SSMScan(xbc [B, T, C], dt [B, T, W], A [H], D [H], dt_bias [H], state [B, H, N, P], mask [B, T], gate [B, T, Wg]?)
//   -> y [B, T, H * P], new_state [B, H, N, P]
//   The Mamba-2 recurrence, S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T and y_t = S_t^T C_t + D x_t, times silu(gate) if
//   there is one, with dt_t = clamp(softplus(dt_t + dt_bias)) mask_t. xbc is [x: H * P | B: G * N | C: G * N];
//   new_state may be the memory of state.
//   Source: Dao and Gu, "Transformers are SSMs" (2024); several tokens take the chunked form of their section 6.
#include <cmath>
#include <vector>

#include "elementary.h"
#include "gemm.h"
#include "ort.h"

namespace h1 {
namespace {

constexpr size_t kChunk = 48;    // tokens; more of them cost more within chunks, fewer cost more between them
constexpr size_t kRows = 24;     // of a chunk's lower triangle, multiplied as one rectangle
constexpr size_t kColumns = 64;  // of a head's state in one item for a thread: columns do not depend on each other
#if defined(H1_NEON)
constexpr size_t kStepVectors = 4;  // of a row of the state, for one token: their sums and inputs stay in registers
#else
constexpr size_t kStepVectors = 8;
#endif

struct Scan {
  size_t batch, tokens, heads, groups, d_head, d_state;
  size_t dt_width, gate_width;
  float dt_min, dt_max;
  const float *xbc, *dt, *A, *D, *dt_bias, *state, *mask, *gate;  // dt and gate at their first column
  float *y, *new_state;

  size_t width() const { return heads * d_head + 2 * groups * d_state; }
  size_t token(size_t b, size_t t) const { return b * tokens + t; }
  const float* x(size_t b, size_t t, size_t h) const { return xbc + token(b, t) * width() + h * d_head; }
  const float* B(size_t b, size_t t, size_t g) const {
    return xbc + token(b, t) * width() + heads * d_head + g * d_state;
  }
  const float* C(size_t b, size_t t, size_t g) const { return B(b, t, groups + g); }
  size_t group(size_t h) const { return h / (heads / groups); }
  const float* gate_of(size_t b, size_t t, size_t h) const { return gate + token(b, t) * gate_width + h * d_head; }
  float* out(size_t b, size_t t, size_t h) const { return y + (token(b, t) * heads + h) * d_head; }

  // dt after bias, softplus, limits and mask; in float64, so that sums of it stay exact enough.
  double step(size_t b, size_t t, size_t h) const {
    if (mask[token(b, t)] == 0) return 0;
    const double raw = double(dt[token(b, t) * dt_width + h]) + dt_bias[h];
    const double softplus = raw > 30 ? raw : std::log1p(std::exp(raw));
    return std::min<double>(std::max<double>(softplus, dt_min), dt_max);
  }
};

// Writes what the state gives, plus D x, times silu(gate), for `width` channels of a token.
void write(const Scan& s, size_t b, size_t t, size_t h, size_t first, size_t width, const float* y) {
  const float* x = s.x(b, t, h) + first;
  const float* gate = s.gate ? s.gate_of(b, t, h) + first : nullptr;
  map(s.out(b, t, h) + first, width, [&](size_t p, auto read) {
    const auto sum = read(y + p) + s.D[h] * read(x + p);
    return gate == nullptr ? sum : sum * silu(read(gate + p));
  });
}

// Computes S = decay S + B u^T and y = S^T C in one pass over `Count` vectors of columns; V is f32x8, or float for the
// last few columns.
template <class V, size_t Count>
void step_columns(size_t rows, size_t width, float decay, const float* B, const float* C, const float* u,
                  const float* state, float* new_state, float* y) {
  constexpr size_t kWidth = sizeof(V) / sizeof(float);  // NOLINT(bugprone-sizeof-expression): V may be float
  V sum[Count] = {}, drive[Count];
  load_all(u, drive);
  for (size_t n = 0; n < rows; ++n) {
    for (size_t j = 0; j < Count; ++j) {
      V S = load_bytes<V>(state + n * width + j * kWidth);
      S = decay * S + B[n] * drive[j];
      store_bytes(new_state + n * width + j * kWidth, S);
      sum[j] += C[n] * S;
    }
  }
  store_all(y, sum);
}

// Advances one head of one sequence by one token: the state is read once and written once.
void step_head(const Scan& s, size_t b, size_t h) {
  static thread_local Scratch<float> scratch;
  float *u = scratch.get(2 * s.d_head), *y = u + s.d_head;
  const double step = s.step(b, 0, h);
  const float decay = float(std::exp(step * s.A[h])), *x = s.x(b, 0, h);
  for (size_t p = 0; p < s.d_head; ++p) u[p] = float(step) * x[p];
  const float *B = s.B(b, 0, s.group(h)), *C = s.C(b, 0, s.group(h));
  const size_t at = (b * s.heads + h) * s.d_state * s.d_head;
  size_t p = 0;
  const auto columns = [&](auto step_some, size_t count) {
    for (; p + count <= s.d_head; p += count) {
      step_some(s.d_state, s.d_head, decay, B, C, u + p, s.state + at + p, s.new_state + at + p, y + p);
    }
  };
  columns(step_columns<f32x8, kStepVectors>, kStepVectors * kLanes);
  columns(step_columns<f32x8, 1>, kLanes);
  columns(step_columns<float, 1>, 1);
  write(s, b, 0, h, 0, s.d_head, y);
}

// Prefetches what a chunk will write, and the next one read: a head's rows are far apart, beyond hardware's
// prefetchers.
void prefetch(const Scan& s, size_t b, size_t t, size_t h, size_t first, size_t width) {
  constexpr size_t kLine = 64 / sizeof(float);
  const float* ahead = s.x(b, std::min(t + kChunk, s.tokens - 1), h) + first;
  for (size_t p = 0; p < width; p += kLine) {
    __builtin_prefetch(ahead + p);
    __builtin_prefetch(s.out(b, t, h) + first + p, 1);
    if (s.gate) __builtin_prefetch(s.gate_of(b, t, h) + first + p);
  }
}

// What the heads of a group share in one chunk.
struct Chunk {
  const float* Bt;  // [N, kChunk]: B transposed, zeros behind the last token
  const float* CB;  // [kChunk, kChunk]: C B^T, its lower triangle
};

void prepare(const Scan& s, size_t b, size_t g, size_t begin, size_t length, float* Bt, float* CB) {
  for (size_t n = 0; n < s.d_state; ++n) {
    for (size_t t = 0; t < length; ++t) Bt[n * kChunk + t] = s.B(b, begin + t, g)[n];
    std::fill(Bt + n * kChunk + length, Bt + (n + 1) * kChunk, 0.0f);
  }
  for (size_t i = 0; i < length; i += kRows) {
    const Strided C{.data = s.C(b, begin + i, g), .row = s.width(), .column = 1};
    gemm(std::min(kRows, length - i), i + kRows, s.d_state, C, Bt, kChunk, CB + i * kChunk, kChunk, nullptr);
  }
}

// Returns first - second[i] for kLanes i, rounded to float32 once.
inline f32x8 difference(double first, const double* second) {
#if defined(H1_NEON)
  const auto two = [=](size_t i) { return vdupq_n_f64(first) - vld1q_f64(second + i); };
  const auto four = [=](size_t i) { return vcvt_high_f32_f64(vcvt_f32_f64(two(i)), two(i + 2)); };
  return {four(0), four(4)};
#else
  using f64x8 = double __attribute__((vector_size(64)));
  f64x8 v;
  std::memcpy(&v, second, sizeof v);
  v = first - v;
  return __builtin_convertvector(v, f32x8);
#endif
}

// The same for as many i as V has lanes.
template <class V>
V differences(double first, const double* second) {
  return difference(first, second);
}
#if defined(H1_AVX512)
template <>
f32x16 differences<f32x16>(double first, const double* second) {
  return joined(difference(first, second), difference(first, second + kLanes));
}
#endif

// Sets mixing[i][j] = CB[i][j] exp(sum of decays from j + 1 to i) for j <= i < length, and zeros up to the end of each
// rectangle of kRows.
void mix(size_t length, const double* total, const float* CB, float* mixing) {
  for (size_t i = 0; i < length; ++i) {
    float* row = mixing + i * kChunk;
    for (size_t j = 0; j <= i; j += lanes<Wide>) {
      store_bytes(row + j, load_bytes<Wide>(CB + i * kChunk + j) * exp(differences<Wide>(total[i], total + j)));
    }
    std::fill(row + i + 1, row + (i / kRows + 1) * kRows, 0.0f);
  }
}

// Some columns of one head of one sequence, chunk after chunk.
class Columns {
 public:
  Columns(const Scan& s, size_t b, size_t h, size_t first, size_t width)
      : s_(s), b_(b), h_(h), first_(first), width_(width) {
    static thread_local Scratch<float> scratch;
    S_ = scratch.get((s.d_state + 3 * kChunk) * kColumns + kChunk * kChunk + s.d_state);
    x_ = S_ + s.d_state * kColumns;
    x_end_ = x_ + kChunk * kColumns;
    y_ = x_end_ + kChunk * kColumns;
    mixing_ = y_ + kChunk * kColumns;
    decay_ = mixing_ + kChunk * kChunk;
    std::fill(S_, y_, 0.0f);  // zeros behind the last column, because products take whole vectors
  }

  // chunk(c) is what the c-th chunk shares.
  template <class GetChunk>
  void run(const GetChunk& chunk) {
    const size_t at = (b_ * s_.heads + h_) * s_.d_state * s_.d_head + first_;
    for (size_t n = 0; n < s_.d_state; ++n) std::copy_n(s_.state + at + n * s_.d_head, width_, S_ + n * kColumns);
    for (size_t begin = 0; begin < s_.tokens; begin += kChunk) {
      step(begin, std::min(kChunk, s_.tokens - begin), chunk(begin / kChunk));
    }
    for (size_t n = 0; n < s_.d_state; ++n) std::copy_n(S_ + n * kColumns, width_, s_.new_state + at + n * s_.d_head);
  }

 private:
  void step(size_t begin, size_t length, const Chunk& chunk) {
    double steps[kChunk] = {}, total[kChunk] = {}, sum = 0;  // total[t]: the sum of log decays up to t
    for (size_t t = 0; t < length; ++t) {
      steps[t] = s_.step(b_, begin + t, h_);
      total[t] = sum += steps[t] * s_.A[h_];
    }
    float from_start[kChunk], to_end[kChunk];
    for (size_t t = 0; t < length; t += kLanes) {
      store(from_start + t, exp(-difference(0, total + t)));
      store(to_end + t, exp(difference(sum, total + t)));
    }
    for (size_t t = 0; t < length; ++t) {
      prefetch(s_, b_, begin + t, h_, first_, width_);
      const float *x = s_.x(b_, begin + t, h_) + first_, now = float(steps[t]), end = now * to_end[t];
      map(x_ + t * kColumns, width_, [&](size_t p, auto read) { return now * read(x + p); });
      map(x_end_ + t * kColumns, width_, [&](size_t p, auto read) { return end * read(x + p); });
    }
    const size_t padded = (width_ + kLanes - 1) / kLanes * kLanes;
    const Strided C{.data = s_.C(b_, begin, s_.group(h_)), .row = s_.width(), .column = 1};
    gemm(length, padded, s_.d_state, C, S_, kColumns, y_, kColumns, nullptr);
    mix(length, total, chunk.CB, mixing_);
    for (size_t i = 0; i < length; i += kRows) {
      const size_t rows = std::min(kRows, length - i);
      const Strided mixing{.data = mixing_ + i * kChunk, .row = kChunk, .column = 1};
      gemm(rows, padded, i + rows, mixing, x_, kColumns, y_ + i * kColumns, kColumns, from_start + i);
    }
    for (size_t t = 0; t < length; ++t) write(s_, b_, begin + t, h_, first_, width_, y_ + t * kColumns);
    std::fill_n(decay_, s_.d_state, float(std::exp(sum)));
    const Strided Bt{.data = chunk.Bt, .row = kChunk, .column = 1};
    gemm(s_.d_state, padded, length, Bt, x_end_, kColumns, S_, kColumns, decay_);
  }

  const Scan& s_;
  const size_t b_, h_, first_, width_;
  float* S_;                // [N, kColumns]
  float *x_, *x_end_, *y_;  // [kChunk, kColumns]
  float* mixing_;           // [kChunk, kChunk]
  float* decay_;            // [N]
};

void ssm_scan(const Parallel& parallel, const Scan& s) {
  if (s.tokens == 1) return parallel(s.batch * s.heads, [&](size_t i) { step_head(s, i / s.heads, i % s.heads); });
  const size_t chunks = (s.tokens + kChunk - 1) / kChunk, strips = (s.d_head + kColumns - 1) / kColumns;
  const size_t size = (s.d_state + kChunk) * kChunk;
  std::vector<float> memory(s.batch * s.groups * chunks * size);
  const auto chunk = [&](size_t b, size_t g, size_t c) {
    return memory.data() + ((b * s.groups + g) * chunks + c) * size;
  };
  parallel(s.batch * s.groups * chunks, [&](size_t i) {
    const size_t b = i / chunks / s.groups, g = i / chunks % s.groups, c = i % chunks;
    float* Bt = chunk(b, g, c);
    prepare(s, b, g, c * kChunk, std::min(kChunk, s.tokens - c * kChunk), Bt, Bt + s.d_state * kChunk);
  });
  parallel(s.batch * s.heads * strips, [&](size_t i) {
    const size_t b = i / strips / s.heads, h = i / strips % s.heads, first = i % strips * kColumns;
    Columns(s, b, h, first, std::min(kColumns, s.d_head - first)).run([&](size_t c) {
      const float* Bt = chunk(b, s.group(h), c);
      return Chunk{.Bt = Bt, .CB = Bt + s.d_state * kChunk};
    });
  });
}

class SSMScan {
 public:
  static constexpr const char* name = "SSMScan";
  static constexpr Port inputs[] = {floats(3), floats(3), floats(1), floats(1),
                                    floats(1), floats(4), floats(2), optional_floats(3)};
  static constexpr Port outputs[] = {floats(3), floats(4)};

  explicit SSMScan(const Attributes& attributes)
      : heads_(attributes.size("heads", kMostHeads)),
        groups_(attributes.size("groups", kMostHeads)),
        d_head_(attributes.size("d_head", kMostHeads)),
        d_state_(attributes.size("d_state", kMostHeads)),
        dt_offset_(attributes.offset("dt_offset")),
        gate_offset_(attributes.offset("gate_offset")),
        dt_min_(attributes.real("dt_min")),
        dt_max_(attributes.real("dt_max")) {
    require(divides(groups_, heads_), "groups must divide heads");
    require(0 <= dt_min_ && dt_min_ <= dt_max_, "dt_min must not be negative, nor above dt_max");
  }

  void compute(const Call& call) const {
    const auto xbc = call.input<float>(0);
    const auto dt = call.input<float>(1);
    const auto A = call.input<float>(2);
    const auto D = call.input<float>(3);
    const auto dt_bias = call.input<float>(4);
    const auto state = call.input<float>(5);
    const auto mask = call.input<float>(6);
    const auto gate = call.input<float>(7);
    const Size batch = xbc.shape[0], tokens = xbc.shape[1], inner = heads_ * d_head_;
    require(xbc.last() == inner + groups_ * d_state_ * 2, "xbc must hold heads * d_head + 2 groups * d_state channels");
    require(dt.shape == Shape{batch, tokens, dt.last()} && lies_within(dt.last(), dt_offset_, heads_),
            "columns lie outside dt, or its rows differ");
    require(!gate || gate.shape == Shape{batch, tokens, gate.last()}, "gate must have the same rows as xbc");
    require(!gate || lies_within(gate.last(), gate_offset_, inner), "columns lie outside gate");
    for (const auto* vector : {&A, &D, &dt_bias}) {
      require(vector->shape == Shape{heads_}, "A, D and dt_bias must be [heads]");
    }
    require(state.shape == Shape{batch, heads_, d_state_, d_head_}, "state must be [batch, heads, d_state, d_head]");
    require(mask.shape == Shape{batch, tokens}, "mask must be [batch, tokens]");
    const auto y = call.output<float>(0, {batch, tokens, inner});
    const auto new_state = call.output<float>(1, state.shape);
    if (batch == Size{0}) return;
    const bool some = tokens > Size{0};
    const Scan arguments{
        .batch = batch.count(),
        .tokens = tokens.count(),
        .heads = heads_.count(),
        .groups = groups_.count(),
        .d_head = d_head_.count(),
        .d_state = d_state_.count(),
        .dt_width = dt.last().count(),
        .gate_width = gate ? gate.last().count() : 0,
        .dt_min = dt_min_,
        .dt_max = dt_max_,
        .xbc = xbc.data,
        .dt = some ? dt.from(dt_offset_) : nullptr,
        .A = A.data,
        .D = D.data,
        .dt_bias = dt_bias.data,
        .state = state.data,
        .mask = mask.data,
        .gate = gate && some ? gate.from(gate_offset_) : nullptr,
        .y = y.data,
        .new_state = new_state.data,
    };
    ssm_scan(call.parallel, arguments);
  }

 private:
  Size heads_, groups_, d_head_, d_state_, dt_offset_, gate_offset_;
  float dt_min_, dt_max_;
};

}  // namespace

const OrtCustomOp* ssm_scan_op() {
  static const Op<SSMScan> op;
  return &op;
}

}  // namespace h1
