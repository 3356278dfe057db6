// The most int8 products a second that one thread gets from the CPU's widest instruction for them: 4 or more independent
// sums, operands in registers. integer_peak.py compiles it once for each level of the kernels.
#include <chrono>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int kSums = 12, kSteps = 20000;

#if defined(__AMX_INT8__)
bool usable() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

int64_t multiply() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } configuration;
  asm volatile("ldtilecfg %0" : : "m"(configuration) : "memory");
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int i = 0; i < kSteps; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return int64_t{4} * 16 * 16 * 64 * kSteps;
}
#elif defined(__AVX2__)
#if defined(__AVX512VNNI__)
using Vector = __m512i;
Vector step(Vector sum, Vector a, Vector b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
using Vector = __m256i;
Vector step(Vector sum, Vector a, Vector b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#else
using Vector = __m256i;  // two instructions: products of bytes, summed in 16 bits
Vector step(Vector sum, Vector a, Vector b) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)); }
#endif
bool usable() { return true; }

int64_t multiply() {
  Vector sums[kSums] = {}, a{}, b{};
  asm volatile("" : "+v"(a), "+v"(b));
  for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kSums; ++k) {  // an index, without which the sums would be in memory
      asm("" : "+v"(a));               // or what does not change is multiplied once
      sums[k] = step(sums[k], a, b);
    }
  }
  for (Vector& sum : sums) asm volatile("" : : "v"(sum));
  return int64_t{kSums} * sizeof(Vector) * kSteps;
}
#else
bool usable() { return false; }
int64_t multiply() { return 0; }
#endif

}  // namespace

// Products a second, of the best of several runs; 0 where this level has no such instruction, or the system refuses it.
extern "C" double products_per_second() {
  if (!usable()) return 0;
  double best = 0;
  for (int run = 0; run < 20; ++run) {
    const auto start = std::chrono::steady_clock::now();
    const auto products = static_cast<double>(multiply());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = products / seconds.count() > best ? products / seconds.count() : best;
  }
  return best;
}
