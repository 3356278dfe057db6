// What products of many tokens multiply on CPUs with AVX512-VNNI: groups of rounded tokens and panels of unpacked rows,
// in the order in which vectors of 512 bits and the tiles of AMX take them. Weights are signed, so that no zero point
// has to be taken off.
#pragma once

#include <algorithm>

#include "activations.h"
#include "matmul.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    !defined(H1_PORTABLE)
#define H1_AVX512_VNNI 1

#include <immintrin.h>

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own intrinsics begin with vectors of no value
#endif

namespace h1 {

constexpr size_t kWide = 16;        // rows of a panel: the lanes of a vector
constexpr uint8_t kUnsigned = 128;  // added to the codes of tokens for instructions that take unsigned ones

// Columns beside each other in a row of a tile; a block is one step, or two.
template <class F>
constexpr size_t kDepth = std::min<size_t>(F::kBlock, 64);

// `kTokens` rounded tokens: codes [blocks, steps, kTokens, kDepth], scales [blocks, kTokens]. Columns that do not exist
// are zeros, and tokens that do not exist have scales of zero.
struct Group {
  uint8_t* codes;
  float* scales;
};

// kWide unpacked rows: codes [blocks, columns / 4, kWide, 4], scales [blocks, kWide] with factors, bias [kWide], and for
// unsigned tokens offsets [blocks, kWide]: what is to be added because of the 128 in their codes.
struct WidePanel {
  int8_t* codes;
  float* scales;
  float* bias;
  int32_t* offsets;
};

// Rounds tokens of `columns` values; `bias` is added to their codes.
template <class F, size_t kTokens>
void round_group(const float* x, size_t tokens, size_t columns, uint8_t bias, size_t blocks, const Group& to) {
  constexpr size_t kStep = kTokens * kDepth<F>;
  for (size_t block = 0; block < blocks; ++block) {
    const size_t start = block * F::kBlock, count = std::min(F::kBlock, columns - start);
    for (size_t t = 0; t < kTokens; ++t) {
      int8_t codes[F::kBlock] = {};
      to.scales[block * kTokens + t] = t < tokens ? round_block(x + t * columns + start, count, codes).scale : 0;
      uint8_t* const of_token = to.codes + block * kTokens * F::kBlock + t * kDepth<F>;
      for (size_t i = 0; i < F::kBlock; ++i) {
        of_token[i / kDepth<F> * kStep + i % kDepth<F>] = static_cast<uint8_t>(codes[i] + bias);
      }
    }
  }
}

// From a word of 4 bytes of each row: the words of 4 signed codes, one or two.
template <class F>
int8_t* unpack_word(__m512i packed, int8_t* to) {
  if constexpr (F::kBits == 8) {
    _mm512_storeu_si512(to, _mm512_xor_si512(packed, _mm512_set1_epi8(static_cast<char>(F::kZeroPoint))));
    return to + 64;
  } else {
    const __m512i mask = _mm512_set1_epi8(15), zero_point = _mm512_set1_epi8(F::kZeroPoint);
    const __m512i even = _mm512_sub_epi8(_mm512_and_si512(packed, mask), zero_point);
    const __m512i odd = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(packed, 4), mask), zero_point);
    const __m512 first = _mm512_castsi512_ps(_mm512_unpacklo_epi8(even, odd));   // two words of rows 0, 1, 4, 5, ...
    const __m512 second = _mm512_castsi512_ps(_mm512_unpackhi_epi8(even, odd));  // and of rows 2, 3, 6, 7, ...
    _mm512_storeu_ps(to, _mm512_shuffle_ps(first, second, 0x88));
    _mm512_storeu_ps(to + 64, _mm512_shuffle_ps(first, second, 0xdd));
    return to + 128;
  }
}

// `count` <= 4 words from `word` on of kWide rows: words[i] has the i-th of each row.
inline void transpose_words(const uint8_t* const (&rows)[kWide], size_t word, size_t count, __m512i (&words)[4]) {
  const auto mask = static_cast<__mmask8>((1 << count) - 1);
  const auto four = [&](size_t r) { return _mm_maskz_loadu_epi32(mask, rows[r] + word * 4); };
  __m512i of_rows[4];
  for (size_t r = 0; r < 4; ++r) {
    of_rows[r] = _mm512_inserti32x4(_mm512_castsi128_si512(four(r)), four(r + 4), 1);
    of_rows[r] = _mm512_inserti32x4(_mm512_inserti32x4(of_rows[r], four(r + 8), 2), four(r + 12), 3);
  }
  const __m512i lower[2] = {_mm512_unpacklo_epi32(of_rows[0], of_rows[1]),
                            _mm512_unpacklo_epi32(of_rows[2], of_rows[3])};
  const __m512i upper[2] = {_mm512_unpackhi_epi32(of_rows[0], of_rows[1]),
                            _mm512_unpackhi_epi32(of_rows[2], of_rows[3])};
  words[0] = _mm512_unpacklo_epi64(lower[0], lower[1]);
  words[1] = _mm512_unpackhi_epi64(lower[0], lower[1]);
  words[2] = _mm512_unpacklo_epi64(upper[0], upper[1]);
  words[3] = _mm512_unpackhi_epi64(upper[0], upper[1]);
}

// Unpacks the rows from `row` on; behind the last it is repeated, because what is not stored may be anything.
template <class F>
void unpack_wide(const Weights& w, size_t row, const WidePanel& panel) {
  const auto row_at = [&](size_t r) { return std::min(row + r, w.rows - 1); };
  const size_t words = w.row_bytes / 4;
  const uint8_t* rows[kWide];
  for (size_t r = 0; r < kWide; ++r) rows[r] = w.codes + row_at(r) * w.row_bytes;
  int8_t* to = panel.codes;
  for (size_t word = 0; word < words; word += 4) {
    const size_t count = std::min<size_t>(4, words - word);
    __m512i of_words[4];
    transpose_words(rows, word, count, of_words);
    for (size_t i = 0; i < count; ++i) to = unpack_word<F>(of_words[i], to);
  }
  for (size_t r = 0; r < kWide; ++r) {
    panel.bias[r] = w.bias ? w.bias[row_at(r)] : 0;
    const float factor = w.factor(row_at(r));
    const Half* const scales = w.scales + row_at(r) * w.blocks;
    for (size_t block = 0; block < w.blocks; ++block)
      panel.scales[block * kWide + r] = factor * to_float(scales[block]);
  }
}

template <class F>
void sum_offsets(const WidePanel& panel, size_t blocks) {
  const int8_t* codes = panel.codes;
  for (size_t block = 0; block < blocks; ++block) {
    __m512i sum = _mm512_setzero_si512();
    for (size_t word = 0; word < F::kBlock / 4; ++word, codes += 64) {
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(codes));
    }
    const __m512i offset = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-kUnsigned));
    _mm512_storeu_si512(panel.offsets + block * kWide, offset);
  }
}

}  // namespace h1

#endif
