// The reverse sweep of the kernel MLP of grid_mlp.cuh: 16 edges by a warp, on tensor cores.
//
// Of every layer n >= 1 its inputs y and z = W y + b are kept in the warp's global memory on the way forward. On the
// way back the state holds gradients: of what couplings read, then in turn of z and of y. Sums over the edges, d_W = Σ
// d_z yᵀ, are products of matrices, too.
#pragma once

#include "exact_gradients.cuh"
#include "exact_mlp_backward.cuh"
#include "grid_mlp.cuh"

namespace implicit_steer::IST_ISA {

// Layer by layer what LayerValue names of 16 edges, [2, W, 2, lane, 4]: a lane's slots of its two edges as
// GridMlp::Part has them. `keep` of GridMlp.
template <typename F, int kWidth, int kFields>
struct KeptLayers<Grid<F, kWidth, kFields>> {
  static constexpr int of_part = 32 * 4, of_kind = kWidth * 2 * of_part;
  static constexpr int of_layer = 0;  // of shared memory

  float* where;  // in shared memory: the pointer, which would take registers

  __device__ __forceinline__ void place(float* memory) const { *reinterpret_cast<float**>(where) = memory; }
  static IST_HOST_DEVICE int size(const PlanView<float>& p) { return (p.n_layers - 1) * 2 * of_kind; }

  // The slots of lane 4 g + t are of edge g + 8 i.
  __device__ __forceinline__ Neighbours<float, 4>& slots(int layer, LayerValue what, int w, int i, int lane) const {
    float* const memory = global_memory(*reinterpret_cast<float* const*>(where));
    return neighbours<4>(memory + ((layer - 1) * 2 + what) * of_kind + (2 * w + i) * of_part + 4 * lane);
  }
  __device__ __forceinline__ void operator()(int layer, LayerValue what, const GridMlp::Part& part) const {
    slots(layer, what, part.w, part.i, threadIdx.x % 32) = part.slots;
  }
};

template <typename S>
struct GridMlpBackward {
  const GridMlp& mlp;
  const float* transposed;  // fragments, from GridMlp::transposed on
  const KeptLayers<S>& kept;
  using Inputs = GridMlp::Inputs;
  using Fragment = GridMlp::Fragment;

  // d_y = Wᵀ d_z in the place of d_z
  __device__ __forceinline__ void linear(int layer, float* state) const {
    mlp.template linear<S, true>(opaque(mlp.hidden + (layer - 1) * GridMlp::layer_size<S>), state);
  }

  // d_z = Aᵀ (φ′(A z) · A⁻ᵀ d_y) in the place of d_y, or of the gradient of what couplings read, before the radial
  // factor. Of the first layer slots 2 t of an edge and channel become d_z of coordinate t, times whose weight is added
  // to d_x, and slots 2 t + 1 shares of the gradient of E.
  template <bool kFirst, bool kLast>
  __device__ __forceinline__ void activations(int layer, const Inputs& inputs, float* state, float (&d_x)[2]) const {
    constexpr int together = GridMlp::kTogether;
    float* const rows[2] = {GridMlp::row(state, 0), GridMlp::row(state, 1)};
#pragma unroll 1
    for (int w = 0; w < S::width; w += together) {
      GridMlp::Sums<kFirst> z;
      Split<4> d_y[2][together];  // slots below 8 and from there on
      float d_z[2][together][4] = {}, d_even[together][2] = {};
#pragma unroll
      for (int n = 0; n < together; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (kFirst)
            mlp.first_layer<S>(inputs, w, n, i, z);
          else
            z.set(n, i, kept.slots(layer, kLayerSums, w + n, i, threadIdx.x % 32));
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto two = neighbours<2>(rows[i] + (w + n) * GridState::channel + 8 * half);
            const float factor = kLast ? inputs.factor[i] : 1;
            d_y[half][n].place(i, two.at[0] * factor), d_y[half][n].place(2 + i, two.at[1] * factor);
          }
        }
      const float *const at = opaque(mlp.fragments), *const back = opaque(transposed);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {  // 8 pairs of samples each
        float upper[together][4], lower[together][4];
        z.samples(at, half, upper, lower);
        float plus[together][4] = {}, minus[together][4] = {};  // A⁻ᵀ d_y of sums and of differences
        if constexpr (kLast) {
          const Fragment even = GridMlp::load(back, GridMlp::of_output + 2 * half);
          const Fragment odd = GridMlp::load(back, GridMlp::of_output + 2 * half + 1);
          mma_3xtf32(plus, d_y[0], even), mma_3xtf32(minus, d_y[1], odd);
        } else {
          const Fragment even = GridMlp::load(back, GridMlp::of_inverse + 3 * half);
          const Fragment odd = GridMlp::load(back, GridMlp::of_inverse + 3 * half + 1);
          const Fragment upper_odd = GridMlp::load(back, GridMlp::of_inverse + 3 * half + 2);
          mma_3xtf32(plus, d_y[0], even);
          mma_3xtf32(minus, d_y[0], odd), mma_3xtf32(minus, d_y[1], upper_odd);
        }
        GridMlp::Pairs of;
#pragma unroll
        for (int n = 0; n < together; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float of_upper = (plus[n][i] + minus[n][i]) * Scaled<typename S::Function>::slope(upper[n][i]);
            const float of_lower = (plus[n][i] - minus[n][i]) * Scaled<typename S::Function>::slope(lower[n][i]);
            of.set(n, i, of_upper, of_lower);
            if (kFirst) d_even[n][i / 2] += of_upper + of_lower;
          }
        if constexpr (kFirst) {
          const Fragment position = GridMlp::load(back, GridMlp::of_position + half);
          mma_3xtf32(d_z[0], of.difference, position);
        } else {
          const Fragment even = GridMlp::load(back, GridMlp::of_samples + 3 * half);
          const Fragment odd = GridMlp::load(back, GridMlp::of_samples + 3 * half + 1);
          const Fragment upper_odd = GridMlp::load(back, GridMlp::of_samples + 3 * half + 2);
          mma_3xtf32(d_z[0], of.sum, even);
          mma_3xtf32(d_z[0], of.difference, odd), mma_3xtf32(d_z[1], of.difference, upper_odd);
        }
      }
#pragma unroll
      for (int n = 0; n < together; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float* const to = rows[i] + (w + n) * GridState::channel;
          if constexpr (kFirst) {
            neighbours<2>(to) = {d_z[0][n][2 * i], d_even[n][i]};
            d_x[i] += mlp.first[4 * (w + n) + threadIdx.x % 4] * d_z[0][n][2 * i];
          } else {
#pragma unroll
            for (int half = 0; half < 2; ++half)
              neighbours<2>(to + 8 * half) = {d_z[half][n][2 * i], d_z[half][n][2 * i + 1]};
          }
        }
    }
  }
};

}  // namespace implicit_steer::IST_ISA
