// Few tokens times int4 weights in vectors of 512 bits, on CPUs with AVX512-VNNI: four rows at a time, two chunks of each.
//
// A lane of dot products sums 8 columns, which 16 bits hold. So two steps that add neighbours bring the sums of four rows
// into one vector, in which lane 4 q + r has 32 columns of row r, the q-th part of the chunks: a block or a part of it.
// What is done for a token does not depend on how many there are.
#pragma once

#include "activations.h"
#include "groups.h"

#if defined(H1_AVX512_VNNI)

namespace h1 {

constexpr size_t kFour = 4;  // rows at a time

// Whether a weight format is multiplied here.
template <class F>
constexpr bool kInFours = F::kBits == 4 && F::kBlock >= 32;

// Brings a rounded token's chunks into pairs: codes are the even columns of both chunks, then the odd ones; floats are
// the scales of 16 lanes, then the integers with which their sums begin, because of the weights' zero point.
template <class F>
void pair_chunks(int8_t* codes, float* floats, size_t chunks) {
  for (size_t chunk = 0; chunk < chunks; chunk += 2) {
    int8_t* const of_pair = codes + chunk * F::kChunk;
    float* const scales = floats + chunk * kFloats;
    std::swap_ranges(of_pair + 32, of_pair + 64, of_pair + 64);
    std::copy_n(scales + kFloats, kLanes, scales + kLanes);
    const __m512i zero_points = _mm512_set1_epi8(F::kZeroPoint);
    __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), zero_points, _mm512_loadu_si512(of_pair));
    sums = _mm512_dpbusd_epi32(sums, zero_points, _mm512_loadu_si512(of_pair + 64));
    _mm512_storeu_si512(scales + kFloats, _mm512_sub_epi32(_mm512_setzero_si512(), sums));
  }
}

// Sums of neighbours, which 16 bits hold: in each quarter two of a, then two of b.
inline __m512i add_neighbours(__m512i a, __m512i b) {
  return _mm512_madd_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16(1));
}

// Four rows from `row` on; where there is none, the last one again.
template <class F>
class FourRows {
 public:
  FourRows(const Weights& w, size_t row) {
    for (size_t r = 0; r < kFour; ++r) {
      const size_t at = std::min(row + r, w.rows - 1);
      codes_[r] = w.codes + at * w.row_bytes;
      scales_[r] = w.scales + at * w.blocks;
    }
  }

  // What of four rows lies in a pair of chunks: packed codes, and scales in the order of lanes.
  struct Pair {
    __m512i packed[kFour];
    __m512 scales;
  };

  Pair whole(size_t pair) const {
    // in the order of memory, what is read some rows later
    for (size_t r = 0; r < kFour; ++r) __builtin_prefetch(codes_[0] + (pair * kFour + r) * 64 + kAhead);
    __builtin_prefetch(scales_[0] + pair * kFour * kBlocks + kAhead / 64 * kBlocks);
    return read(pair, kBlocks, [](const uint8_t* codes) { return _mm512_loadu_si512(codes); });
  }

  // The last pair, of which `bytes` and `blocks` exist; the others are zeros.
  Pair part(size_t pair, size_t bytes, size_t blocks) const {
    const __mmask64 exist = (uint64_t{1} << bytes) - 1;
    return read(pair, blocks, [exist](const uint8_t* codes) { return _mm512_maskz_loadu_epi8(exist, codes); });
  }

 private:
  static constexpr size_t kBlocks = 128 / F::kBlock;  // in a pair of chunks: 4, 2 or 1

  template <class Load>
  Pair read(size_t pair, size_t blocks, const Load& load) const {
    Pair found;
    __m128i scales[kFour];
    for (size_t r = 0; r < kFour; ++r) {
      found.packed[r] = load(codes_[r] + pair * 64);
      int64_t halves = 0;
      std::memcpy(&halves, scales_[r] + pair * kBlocks, blocks * sizeof(Half));
      scales[r] = _mm_cvtsi64_si128(halves);
    }
    found.scales = in_order(scales);
    return found;
  }

  static __m512 in_order(const __m128i (&of_row)[kFour]) {
    const __m128i first = _mm_unpacklo_epi16(of_row[0], of_row[1]), second = _mm_unpacklo_epi16(of_row[2], of_row[3]);
    const __m256i of_blocks = _mm256_set_m128i(_mm_unpackhi_epi32(first, second), _mm_unpacklo_epi32(first, second));
    const __m512 scales = _mm512_maskz_cvtph_ps(0xffff, of_blocks);  // four rows, block by block
    if constexpr (kBlocks == 4) return scales;
    return _mm512_maskz_shuffle_f32x4(0xffff, scales, scales, kBlocks == 2 ? 0x50 : 0);
  }

  const uint8_t* codes_[kFour];
  const Half* scales_[kFour];
};

// Four rows from `row` on, times kTokens tokens from `token`.
template <class F, size_t kTokens>
void multiply_four(const Weights& w, size_t row, const Activations& a, size_t token, float* y) {
  const FourRows<F> rows(w, row);
  const __m512i mask = _mm512_set1_epi8(15);
  const int8_t* const x = a.codes + token * a.chunks * F::kChunk;
  const float* const floats = a.floats + token * a.chunks * kFloats;
  __m512 sums[kTokens];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  const auto add = [&](size_t pair, const typename FourRows<F>::Pair& of_rows) {
    __m512i even[kFour], odd[kFour];
    for (size_t r = 0; r < kFour; ++r) {
      even[r] = _mm512_and_si512(of_rows.packed[r], mask);
      odd[r] = _mm512_and_si512(_mm512_srli_epi16(of_rows.packed[r], 4), mask);
    }
#pragma GCC unroll 8
    for (size_t t = 0; t < kTokens; ++t) {
      const int8_t* const codes = x + (t * a.chunks + 2 * pair) * F::kChunk;
      const float* const of_pair = floats + (t * a.chunks + 2 * pair) * kFloats;
      const __m512i even_columns = _mm512_loadu_si512(codes), odd_columns = _mm512_loadu_si512(codes + 64);
      const __m512i start = _mm512_loadu_si512(of_pair + kFloats);
      __m512i dots[kFour];
      for (size_t r = 0; r < kFour; ++r) {
        dots[r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, even[r], even_columns), odd[r], odd_columns);
      }
      const __m512i total = add_neighbours(add_neighbours(dots[0], dots[1]), add_neighbours(dots[2], dots[3]));
      const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_loadu_ps(of_pair));
      sums[t] = _mm512_fmadd_ps(value, of_rows.scales, sums[t]);
    }
  };
  const size_t pairs = w.row_bytes / 64, rest = w.row_bytes % 64;
  for (size_t pair = 0; pair < pairs; ++pair) add(pair, rows.whole(pair));
  if (rest) add(pairs, rows.part(pairs, rest, w.blocks - pairs * 128 / F::kBlock));
  const auto exist = static_cast<__mmask8>((1U << std::min(kFour, w.rows - row)) - 1);
  const __m128 factors = w.factors ? _mm_maskz_loadu_ps(exist, w.factors + row) : _mm_set1_ps(1);
  const __m128 bias = w.bias ? _mm_maskz_loadu_ps(exist, w.bias + row) : _mm_setzero_ps();
  for (size_t t = 0; t < kTokens; ++t) {
    const auto half = [&]<int kHalf>() { return _mm512_maskz_extractf32x8_ps(0xff, sums[t], kHalf); };
    const __m256 halves = _mm256_add_ps(half.template operator()<0>(), half.template operator()<1>());
    const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    _mm_mask_storeu_ps(y + (token + t) * w.rows + row, exist, _mm_fmadd_ps(sum, factors, bias));
  }
}

// Rows from `begin`, a multiple of four, to `end` times all of a few tokens; rows stay in the cache meanwhile.
template <class F>
void multiply_fours(const Weights& w, size_t begin, size_t end, const Activations& a, size_t tokens, float* y) {
  for (size_t row = begin; row < end; row += kFour) {
    size_t token = 0;
    for (; token + 8 <= tokens; token += 8) multiply_four<F, 8>(w, row, a, token, y);
    for (; token + 4 <= tokens; token += 4) multiply_four<F, 4>(w, row, a, token, y);
    for (; token + 2 <= tokens; token += 2) multiply_four<F, 2>(w, row, a, token, y);
    if (token < tokens) multiply_four<F, 1>(w, row, a, token, y);
  }
}

}  // namespace h1

#endif
