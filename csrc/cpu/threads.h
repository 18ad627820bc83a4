// Loops over blocks, on several threads, in which subnormal numbers count as 0. No torch.
#pragma once

#include <atomic>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace implicit_steer::IST_ISA {

// While it lives, its thread takes and makes no subnormal numbers (below 2^-126 in float), but 0. Gaussian shells fade
// through them far from the origin, where every operation would take some hundred cycles.
class NoSubnormals {
 public:
#if defined(__x86_64__)
  NoSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | kDenormalsAreZero); }
  ~NoSubnormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kDenormalsAreZero = 0x40;
  unsigned before_;
#elif defined(__aarch64__)
  NoSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | kFlushToZero));
  }
  ~NoSubnormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  static constexpr uint64_t kFlushToZero = uint64_t{1} << 24;
  uint64_t before_;
#else
  NoSubnormals() {}
#endif
  NoSubnormals(const NoSubnormals&) = delete;
};

// f(b) for every block b, on at most so many threads: each takes the next block as soon as it is free, so that one that
// other programs hold up does not hold up the rest.
template <typename F>
void for_blocks(int threads, int blocks, F f) {
  if (threads == 1 || blocks == 1) {
    const NoSubnormals here;
    for (int b = 0; b < blocks; ++b) f(b);
    return;
  }
  std::atomic<int> next{0};
#pragma omp parallel num_threads(threads < blocks ? threads : blocks)
  {
    const NoSubnormals here;
    for (int b; (b = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) f(b);
  }
}

}  // namespace implicit_steer::IST_ISA
