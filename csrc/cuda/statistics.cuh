// Batch statistics of one hidden activation: sums and sums of squares of the full hidden field over all edges.
#pragma once

#include "warp.cuh"

namespace implicit_steer::IST_ISA {

template <typename R>
struct Statistics : Warp<R, false, false> {
  using Base = Warp<R, false, false>;
  using Base::a, Base::p, Base::e, Base::lane, Base::n_edges;
  const int n_values;
  R *shift, *sums;  // [channels * d]; [2, channels * d]

  __device__ __forceinline__ explicit Statistics(const Call<R>& call)
      : Base(call), n_values(norm_input_size(call.plan)) {
    shift = this->rest, sums = shift + n_values;
  }

  // Full hidden coordinate k of the tile's edge l from its activations.
  __device__ __forceinline__ R coordinate(const R* y, int l, int k) const {
    const int m = k % p.d;
    y = this->of_edge(y + k / p.d * p.c, l);
    const R *const first = this->of_edge(e.first, l), *const second = this->of_edge(e.second, l);
    if (p.kind == kZonal) return y[p.coordinate[m]] * first[m];
    if (p.kind == kPlanar) return turned(p, first, second, y, m);
    return y[m];
  }

  __device__ __forceinline__ const R* evaluate(int64_t begin, int64_t end) {
    this->load(begin, end);
    this->enter_frame(true);
    return this->layers(a.layer, false);
  }

  // The values at edge 0 are subtracted: less cancellation in the variance.
  __device__ __forceinline__ void run(R* partial, R* shift_out) {
    const R* y = evaluate(0, 1);
    for (int k = lane; k < n_values; k += 32) {
      shift[k] = coordinate(y, 0, k), sums[k] = sums[n_values + k] = 0;
      if (this->number == 0) shift_out[k] = shift[k];
    }
    __syncwarp();
    for (int64_t at = this->first; at < this->last; at += this->tile) {
      y = evaluate(at, this->last);
      for (int k = lane; k < n_values; k += 32)
        for (int l = 0; l < n_edges; ++l) {
          const R h = coordinate(y, l, k) - shift[k];
          sums[k] += h, sums[n_values + k] += h * h;
        }
      __syncwarp();
    }
    for (int k = lane; k < n_values; k += 32) {
      R* const row = partial + 2 * n_values * this->number;
      row[k] = sums[k], row[n_values + k] = sums[n_values + k];
    }
  }
};

// partial: [warps, 2, channels * d], then [channels * d] what was subtracted
template <typename R>
__global__ void __launch_bounds__(kThreads, kResident<R>) conv_statistics(const __grid_constant__ Call<R> call) {
  Statistics<R> warp(call);
  if (warp.number < call.shape.warps) warp.run(call.partial, call.partial + 2 * warp.n_values * call.shape.warps);
}

// sums: [2, channels * d] in double
template <typename R>
__global__ void norm_statistics(const __grid_constant__ PlanView<R> plan, int n, const double* sums, const R* shift,
                                double count, const __grid_constant__ Pieces<const R> parameters, R* statistics,
                                R* packed) {
  const int channels = norm_channels(plan), w = blockIdx.x * blockDim.x + threadIdx.x;
  if (w >= channels) return;
  R* const mean = statistics + n * statistics_size(plan);
  channel_statistics(plan, channels, w, sums, shift, count, mean, mean + channels * plan.n_trivial);
  pack_channel(plan, n, w, parameters, statistics, packed);
}

// sums: [2, size] in double; moments: [2, size]
template <typename R>
__global__ void norm_moments(const __grid_constant__ PlanView<R> plan, int size, const double* sums, const R* shift,
                             double count, R* moments) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k < size) coordinate_moments(plan, size, k, sums, shift, count, moments);
}

}  // namespace implicit_steer::IST_ISA
