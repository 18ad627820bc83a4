// What every caller of the loops needs: the table of an instruction set, and statistics from sums. No torch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "conv.h"

namespace implicit_steer {

// The widest set that this build and this machine have: 1 baseline, 2 AVX2, 3 AVX-512.
inline int widest_instruction_set() {
#if defined(IST_HAVE_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 3 : 2;
#else
  return 1;
#endif
}

// The entry points of the set `isa`, 1 .. widest_instruction_set().
template <typename R>
const ConvTable<R>& conv_table([[maybe_unused]] int isa) {
  constexpr bool single = std::is_same_v<R, float>;
#if defined(IST_HAVE_X86)
  if constexpr (single) {
    if (isa == 3) return avx512::kConvFloat;
    if (isa == 2) return avx2::kConvFloat;
  } else {
    if (isa == 3) return avx512::kConvDouble;
    if (isa == 2) return avx2::kConvDouble;
  }
#endif
  if constexpr (single)
    return baseline::kConvFloat;
  else
    return baseline::kConvDouble;
}

// Mean and unbiased variance [n] over E edges from what ConvTable::statistics leaves: sums [2, n] of h - shift and of
// its square, and the shift [n] in `mean`.
inline void moments(int64_t n, int64_t n_edges, const double* sums, double* mean, double* variance) {
  const double count = static_cast<double>(n_edges);
  for (int64_t k = 0; k < n; ++k) {
    const double shifted = sums[k] / count;
    mean[k] += shifted;
    variance[k] = std::max(sums[n + k] - shifted * sums[k], 0.0) / (count - 1);
  }
}

}  // namespace implicit_steer
