// Sizes that kernels are compiled for, beside any: zonal frames with c coefficients per channel and as many channels in
// every hidden layer. Loops over them are unrolled and a channel stays in registers; the weights between hidden layers
// and the samples lie in shared memory, where four of them are one load.
#pragma once

#include "../edge_mlp.h"
#include "call.h"
#include "compat.cuh"
#include "neighbours.cuh"

namespace implicit_steer::IST_ISA {

template <typename F, int kCoefficients, int kWidth>
struct Specialised {
  using Function = F;
  static constexpr bool specialised = true;
  static constexpr int c = kCoefficients, even = (c + 1) / 2, width = kWidth;
  static constexpr int row = (c + 3) / 4 * 4;  // of samples
  static_assert(kWidth % 4 == 0);
};

// What one of the lanes that share an edge does: first, first + step, …
struct Share {
  int first, step;
};

// The layers as a block has them in its shared memory, and what is done with one channel or the whole of a layer.
template <typename S, typename R>
struct SpecialisedLayers {
  R *samples, *inverse;  // [n_pairs, S::row]
  R* weights;            // [n_layers - 1, c, width, width]: coefficient, row, column
  int n_pairs;

  // Numbers that the layers need; p can be read on the host.
  static int64_t size(const PlanView<R>& p) {
    return int64_t{2} * p.layers[0].n_pairs * S::row + int64_t{p.n_layers - 1} * S::c * S::width * S::width;
  }

  __device__ __forceinline__ void place(R* memory, const PlanView<R>& p) {
    n_pairs = p.layers[0].n_pairs;
    samples = memory, inverse = samples + n_pairs * S::row, weights = inverse + n_pairs * S::row;
  }

  // By all threads of the block.
  __device__ __forceinline__ void copy(const PlanView<R>& p, const R* packed) {
    const R *const a = global_memory(p.layers[0].pair_samples), *const b = global_memory(p.layers[0].pair_inverse);
    for (int k = threadIdx.x; k < n_pairs * S::c; k += blockDim.x) {
      const int at = k / S::c * S::row + k % S::c;
      samples[at] = a[k], inverse[at] = b[k];
    }
    constexpr int n_values = S::width * S::width;
    for (int n = 1; n < p.n_layers; ++n) {
      const int32_t* const groups = global_memory(p.layers[n].groups);
      const R* const values = packed + p.layers[n].weight;
      for (int k = threadIdx.x; k < S::c * n_values; k += blockDim.x)
        weights[((n - 1) * S::c + group_coefficient(groups, k / n_values)) * n_values + k % n_values] = values[k];
    }
  }

  // Group n of a layer's rows has one coefficient of all channels.
  __device__ __forceinline__ static int group_coefficient(const int32_t* groups, int n) {
    return groups[n * (2 + 2 * S::width) + 2];
  }

  __device__ __forceinline__ const R* weights_of(int layer, int coefficient) const {
    return weights + ((layer - 1) * S::c + coefficient) * S::width * S::width;
  }

  // z = W y + b of layer n >= 1
  __device__ __forceinline__ void linear(int n, const R* bias, const R* y, R* z, Share own) const {
#pragma unroll
    for (int k = 0; k < S::c; ++k) {
      const R* const w = weights_of(n, k);
      R in[S::width];
#pragma unroll
      for (int i = 0; i < S::width; ++i) in[i] = y[i * S::c + k];
      for (int r = own.first; r < S::width; r += own.step) {
        R sum = bias[r * S::c + k];
#pragma unroll
        for (int i = 0; i < S::width; i += 4) {
          const auto four = neighbours<4>(w + r * S::width + i);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum += four.at[j] * in[i + j];
        }
        z[r * S::c + k] = sum;
      }
    }
  }

  // d_y = Wᵀ d_z of layer n >= 1
  __device__ __forceinline__ void linear_inputs(int n, const R* d_z, R* d_y, Share own) const {
#pragma unroll
    for (int k = 0; k < S::c; ++k) {
      const R* const w = weights_of(n, k);
      R d[S::width];
#pragma unroll
      for (int r = 0; r < S::width; ++r) d[r] = d_z[r * S::c + k];
      for (int i = own.first; i < S::width; i += own.step) {
        R sum{};
#pragma unroll
        for (int r = 0; r < S::width; ++r) sum += d[r] * w[r * S::width + i];
        d_y[i * S::c + k] = sum;
      }
    }
  }

  struct Rows {
    R a[S::row], inverse[S::row];
  };
  __device__ __forceinline__ Rows rows(int pair) const {
    Rows result;
#pragma unroll
    for (int k = 0; k < S::row; k += 4) {
      const auto a = neighbours<4>(samples + pair * S::row + k), b = neighbours<4>(inverse + pair * S::row + k);
#pragma unroll
      for (int j = 0; j < 4; ++j) result.a[k + j] = a.at[j], result.inverse[k + j] = b.at[j];
    }
    return result;
  }

  // The even and the odd part of a row's sum.
  __device__ __forceinline__ static void parts(const R* row, const R* in, R& even, R& odd) {
    even = odd = R{};
#pragma unroll
    for (int k = 0; k < S::c; ++k) (k < S::even ? even : odd) += row[k] * in[k];
  }
  __device__ __forceinline__ static void add_parts(const R* row, R even, R odd, R* out) {
#pragma unroll
    for (int k = 0; k < S::c; ++k) out[k] += (k < S::even ? even : odd) * row[k];
  }

  // y = A⁻ φ(A z) of one channel
  __device__ __forceinline__ void activation(const R* z_w, R* y_w) const {
    R z[S::c], y[S::c] = {};
#pragma unroll
    for (int k = 0; k < S::c; ++k) z[k] = z_w[k];
    for (int pair = 0; pair < n_pairs; ++pair) {
      const Rows row = rows(pair);
      R even, odd;
      parts(row.a, z, even, odd);
      const R plus = S::Function::value(even + odd), minus = S::Function::value(even - odd);
      add_parts(row.inverse, plus + minus, plus - minus, y);
    }
#pragma unroll
    for (int k = 0; k < S::c; ++k) y_w[k] = y[k];
  }

  // d_z = Aᵀ (φ′(A z) · A⁻ᵀ d_y)
  __device__ __forceinline__ void activation_backward(const R* z_w, const R* d_y_w, R* d_z_w) const {
    R z[S::c], d_y[S::c], d_z[S::c] = {};
#pragma unroll
    for (int k = 0; k < S::c; ++k) z[k] = z_w[k], d_y[k] = d_y_w[k];
    for (int pair = 0; pair < n_pairs; ++pair) {
      const Rows row = rows(pair);
      R even, odd, d_even, d_odd;
      parts(row.a, z, even, odd), parts(row.inverse, d_y, d_even, d_odd);
      const R plus = (d_even + d_odd) * S::Function::prime(even + odd);
      const R minus = (d_even - d_odd) * S::Function::prime(even - odd);
      add_parts(row.a, plus + minus, plus - minus, d_z);
    }
#pragma unroll
    for (int k = 0; k < S::c; ++k) d_z_w[k] = d_z[k];
  }
};

}  // namespace implicit_steer::IST_ISA
