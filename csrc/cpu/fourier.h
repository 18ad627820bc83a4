// Fourier activations y = A⁻ φ(A x) of node features: what the torch binding hands to the loops of cpu/fourier.cpp.
#pragma once

#include <cstdint>

namespace implicit_steer {

template <typename R>
struct FourierArgs {
  const R* x;                    // [fields / inner, d, inner]
  const R* grad;                 // as x: the output's gradient, read by the reverse sweep alone
  const R *samples, *inverse_t;  // A and A⁻ transposed, [n_samples, d] each
  R* out;                        // as x: the output, or the gradient of x
  R* scratch;                    // [blocks, fourier_scratch(d)], 64-byte aligned
  int64_t fields, inner, d;
  int n_samples, function, threads, blocks;
};

// Numbers of one block's scratch memory: x, the output's gradient and the result for the widest tile of fields.
template <typename R>
constexpr int64_t fourier_scratch(int64_t d) {
  return 3 * d * (64 / static_cast<int64_t>(sizeof(R)));
}

template <typename R>
struct FourierTable {
  void (*forward)(const FourierArgs<R>&);
  void (*backward)(const FourierArgs<R>&);
};

#define IST_DECLARE(ISA)                            \
  namespace ISA {                                   \
  extern const FourierTable<float> kFourierFloat;   \
  extern const FourierTable<double> kFourierDouble; \
  }
IST_DECLARE(baseline)
IST_DECLARE(avx2)
IST_DECLARE(avx512)
#undef IST_DECLARE

}  // namespace implicit_steer
