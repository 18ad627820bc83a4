// Loops over threads in which subnormal numbers count as 0. No torch.
#pragma once

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

// f(t) for every thread t.
template <typename F>
void in_threads(int threads, F f) {
  if (threads == 1) {
    const NoSubnormals here;
    return f(0);
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    const NoSubnormals here;
    f(t);
  }
}

}  // namespace implicit_steer::IST_ISA
