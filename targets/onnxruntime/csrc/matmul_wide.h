// Quantised weights times rounded activations of many tokens on CPUs with AVX512-VNNI:
//
//   y[t, n] = bias[n] + sum over blocks b of factor[n] * scale_w[n, b] * scale_x[t, b] * (sum of code_w * code_x)
//
// An item for a thread unpacks some panels of rows once; groups of tokens then pass over them. Sums of a block come from
// AMX, 16 tokens times 16 rows at a time, where the CPU has it and the system allows it, or else from dot products in
// vectors of 512 bits.
#pragma once

#include "groups.h"

#if defined(H1_AVX512_VNNI)

#if defined(__AMX_INT8__) && defined(__linux__)
#define H1_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace h1 {

constexpr size_t kPanelsOfItem = 4;  // their codes stay in the second-level cache, and a group's in the first

// Adds the sums of a block for a token, times their scales.
inline __m512 add_scaled(__m512i sums, float x_scale, __m512 w_scales, __m512 to) {
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(x_scale)), w_scales, to);
}

// Dot products of 4 bytes: 12 chains of them keep two units busy, and their sums and those of floats are in registers.
template <class F>
class Vectors {
 public:
  static constexpr size_t kTokens = 12;
  static constexpr uint8_t kBias = kUnsigned;

  void operator()(const Group& group, const WidePanel& panel, size_t blocks, __m512 (&sums)[kTokens]) const {
    const uint8_t* x = group.codes;
    const int8_t* rows = panel.codes;
    for (size_t block = 0; block < blocks; ++block) {
      __m512i of_block[kTokens];
      const __m512i offsets = _mm512_loadu_si512(panel.offsets + block * kWide);
      for (__m512i& sum : of_block) sum = offsets;
      for (size_t step = 0; step < F::kBlock / kDepth<F>; ++step, x += kTokens * kDepth<F>) {
#pragma GCC unroll 8
        for (size_t word = 0; word < kDepth<F> / 4; ++word, rows += 64) {
          const __m512i of_rows = _mm512_loadu_si512(rows);
#pragma GCC unroll 12
          for (size_t t = 0; t < kTokens; ++t) {
            int32_t four;
            std::memcpy(&four, x + t * kDepth<F> + word * 4, sizeof four);
            of_block[t] = _mm512_dpbusd_epi32(of_block[t], _mm512_set1_epi32(four), of_rows);
          }
        }
      }
      const __m512 scales = _mm512_loadu_ps(panel.scales + block * kWide);
#pragma GCC unroll 12
      for (size_t t = 0; t < kTokens; ++t) {
        sums[t] = add_scaled(of_block[t], group.scales[block * kTokens + t], scales, sums[t]);
      }
    }
  }
};

#if defined(H1_TILES)
// Whether the operating system lets this process use tiles, whose 8 KiB it has to save for each thread.
inline bool tiles_allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // Linux: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

// Tiles 0 and 1 are sums, 2 has tokens and 3 rows, as long as this object lives.
template <class F>
class Tiles {
 public:
  static constexpr size_t kTokens = 16;
  static constexpr uint8_t kBias = 0;  // signed codes

  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_of_row[16] = {64, 64, kDepth<F>, 64};
      uint8_t rows[16] = {kTokens, kTokens, kTokens, kDepth<F> / 4};
    } configuration;
    // not GCC 12's own function, which says that it reads 8 bytes; "memory": tiles are loaded from what is stored before
    asm volatile("ldtilecfg %0" : : "m"(configuration) : "memory");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }  // or the system would save tiles at each switch of threads

  // A block is multiplied while the one before is added.
  void operator()(const Group& group, const WidePanel& panel, size_t blocks, __m512 (&sums)[kTokens]) const {
    alignas(64) int32_t memory[2][kTokens * kWide];
    const auto multiply = [&]<size_t kSum>(size_t block) {
      constexpr size_t kBytes = F::kBlock * kTokens;
      multiply_block<kSum>(group.codes + block * kBytes, panel.codes + block * kBytes);
    };
    const auto add = [&](size_t block) {
      const __m512 scales = _mm512_loadu_ps(panel.scales + block * kWide);
#pragma GCC unroll 16
      for (size_t t = 0; t < kTokens; ++t) {
        const __m512i of_block = _mm512_load_si512(memory[block % 2] + t * kWide);
        sums[t] = add_scaled(of_block, group.scales[block * kTokens + t], scales, sums[t]);
      }
    };
    multiply.template operator()<0>(0);
    _tile_stored(0, memory[0], 64);
    for (size_t block = 0; block < blocks; block += 2) {
      if (block + 1 < blocks) multiply.template operator()<1>(block + 1);
      add(block);
      if (block + 1 == blocks) break;
      if (block + 2 < blocks) multiply.template operator()<0>(block + 2);
      _tile_stored(1, memory[1], 64);
      add(block + 1);
      if (block + 2 < blocks) _tile_stored(0, memory[0], 64);
    }
  }

 private:
  // The numbers of tiles are part of the instructions.
  template <size_t kSum>
  static void multiply_block(const uint8_t* tokens, const int8_t* rows) {
    if constexpr (kSum == 0) {
      _tile_zero(0);
    } else {
      _tile_zero(1);
    }
    for (size_t step = 0; step < F::kBlock / kDepth<F>; ++step) {
      _tile_loadd(2, tokens + step * kDepth<F> * kTokens, kDepth<F>);
      _tile_loadd(3, rows + step * kDepth<F> * kWide, 64);
      if constexpr (kSum == 0) {
        _tile_dpbssd(0, 2, 3);
      } else {
        _tile_dpbssd(1, 2, 3);
      }
    }
  }
};
#endif

// All tokens, times the rows of up to kPanelsOfItem panels from `row` on. Sums are those of Vectors or Tiles.
template <class F, template <class> class Sums>
void multiply_item(const Weights& w, size_t row, const Group& x, size_t tokens, float* y) {
  constexpr size_t kTokens = Sums<F>::kTokens;
  static thread_local Scratch<int8_t> code_memory;
  static thread_local Scratch<float> float_memory;
  static thread_local Scratch<int32_t> offset_memory;
  const size_t panels = std::min(kPanelsOfItem, (w.rows - row + kWide - 1) / kWide), floats = w.blocks * kWide;
  float* const all_floats = float_memory.get(panels * (floats + kWide));
  int8_t* const all_codes = code_memory.get(panels * floats * F::kBlock);
  int32_t* const all_offsets = offset_memory.get(panels * floats);
  WidePanel panel[kPanelsOfItem];
  for (size_t i = 0; i < panels; ++i) {
    float* const scales = all_floats + i * (floats + kWide);
    panel[i] = {.codes = all_codes + i * floats * F::kBlock,
                .scales = scales,
                .bias = scales + floats,
                .offsets = all_offsets + i * floats};
    unpack_wide<F>(w, row + i * kWide, panel[i]);
    if (Sums<F>::kBias != 0) sum_offsets<F>(panel[i], w.blocks);
  }
  const Sums<F> add_products;
  for (size_t token = 0; token < tokens; token += kTokens) {
    const Group group{.codes = x.codes + token * w.blocks * F::kBlock, .scales = x.scales + token * w.blocks};
    for (size_t i = 0; i < panels; ++i) {
      const size_t first = row + i * kWide, count = std::min(kTokens, tokens - token);
      for (size_t t = 0; t < count; ++t) __builtin_prefetch(y + (token + t) * w.rows + first, 1);
      __m512 sums[kTokens];
      for (__m512& sum : sums) sum = _mm512_loadu_ps(panel[i].bias);
      add_products(group, panel[i], w.blocks, sums);
      const auto mask = static_cast<__mmask16>((1U << std::min(kWide, w.rows - first)) - 1);
      for (size_t t = 0; t < count; ++t) {
        _mm512_mask_storeu_ps(y + (token + t) * w.rows + first, mask, sums[t]);
      }
    }
  }
}

template <class F, template <class> class Sums>
void matmul_groups(const Weights& w, const float* x, size_t all, float* y, const Parallel& parallel) {
  constexpr size_t kTokens = Sums<F>::kTokens, kRows = kPanelsOfItem * kWide;
  constexpr size_t kMost = kSlab / kTokens * kTokens;  // whole groups
  static thread_local Scratch<uint8_t> code_memory;
  static thread_local Scratch<float> scale_memory;
  for (size_t start = 0; start < all; start += kMost) {
    const size_t tokens = std::min(kMost, all - start), groups = (tokens + kTokens - 1) / kTokens;
    const Group rounded{.codes = code_memory.get(groups * kTokens * w.blocks * F::kBlock),
                        .scales = scale_memory.get(groups * kTokens * w.blocks)};
    const float* const from = x + start * w.columns;
    parallel(groups, [&](size_t group) {
      const size_t token = group * kTokens;
      const Group to{.codes = rounded.codes + token * w.blocks * F::kBlock,
                     .scales = rounded.scales + token * w.blocks};
      round_group<F, kTokens>(from + token * w.columns, std::min(kTokens, tokens - token), w.columns, Sums<F>::kBias,
                              w.blocks, to);
    });
    parallel((w.rows + kRows - 1) / kRows,
             [&](size_t item) { multiply_item<F, Sums>(w, item * kRows, rounded, tokens, y + start * w.rows); });
  }
}

template <class F>
void matmul_wide(const Weights& w, const float* x, size_t tokens, float* y, const Parallel& parallel) {
#if defined(H1_TILES)
  if (tiles_allowed()) return matmul_groups<F, Tiles>(w, x, tokens, y, parallel);
#endif
  matmul_groups<F, Vectors>(w, x, tokens, y, parallel);
}

}  // namespace h1
#endif
