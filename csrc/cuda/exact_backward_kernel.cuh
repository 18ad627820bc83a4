// The kernel of an exact backward pass, with an MLP or a table, and what its launches take.
#pragma once

#include <type_traits>

#include "exact_backward.cuh"
#include "exact_table_backward.cuh"

namespace implicit_steer::IST_ISA {

// With the path u × x there is shared memory for two blocks, and registers for more fragments; of large ones for one.
// On sm_120, and for tables on sm_100, the registers of three blocks are too few.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kMostExactBackward = 2, kMostTableBackward = 2;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostExactBackward = kResident<float>, kMostTableBackward = 2;
#else
constexpr int kMostExactBackward = kResident<float>, kMostTableBackward = kResident<float>;
#endif
template <typename S>
constexpr int kExactBackwardThreads = S::large ? 256 : kThreads;
template <typename S>
constexpr int kExactBackwardResident = S::large               ? 1
                                       : S::Slots::count > 11 ? 2
                                       : S::Mlp::is_table     ? kMostTableBackward
                                                              : kMostExactBackward;

template <typename S>
using BackwardWarp = std::conditional_t<S::Mlp::is_table, ExactTableReverse<S, ExactBackward<S>>, ExactBackward<S>>;

template <typename S>
__global__ void __launch_bounds__(kExactBackwardThreads<S>, kExactBackwardResident<S>)
    exact_backward(const __grid_constant__ FieldCall call) {
  BackwardWarp<S> warp(call);
  run_warps<S>(warp, call);
}

}  // namespace implicit_steer::IST_ISA
