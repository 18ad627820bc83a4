// The gradients of θ in an exact backward pass, summed as those of the MLP's weights (layer_gradients.cuh), which
// follow them: of θ and the constant hidden feature's, which batch norms are folded into.
#pragma once

#include "exact_warp.cuh"
#include "layer_gradients.cuh"

namespace implicit_steer::IST_ISA {

// Numbers of a warp in front of its MLP's: [path, v / 8, w / 8, u / 2, lane, (u, w)], then of the constant feature
// [v / 8, u / 8, lane, (u, constant)]. Lane 4 g + t has v = g and w (or u) = 2 t and 2 t + 1, of eight.
template <typename S>
constexpr int kThetaSums = S::Slots::paths * ExactTiles<S>::passes * S::fields / 2 * 128;
template <typename S>
constexpr int kFieldSums = kThetaSums<S> + ExactTiles<S>::blocks * ExactTiles<S>::blocks * 128;

template <typename S>
struct ExactGradients : LayerGradients<S, kFieldSums<S>> {
  using Base = LayerGradients<S, kFieldSums<S>>;
  using Base::p, Base::memory, Base::lane;
  using Slots = typename S::Slots;
  using Tiles = ExactTiles<S>;
  static constexpr int constant = kThetaSums<S>;
  static constexpr int aside = kNodeSum<S>;  // behind the sums: T of a node that goes on

  __device__ __forceinline__ ExactGradients(float* of_warps, int number, const PlanView<float>& p,
                                            const FieldView& view)
      : Base(of_warps, number, Base::size_of(p) + aside, p, view) {}

  // As of all layers. It is wanted seldom: where registers are few none is kept for it.
  __device__ __forceinline__ float& one(int begin) const {
    return memory[begin + (S::large ? thread_of_block() % 32 : lane())];
  }
  __device__ __forceinline__ float* aside_of_lane() const { return memory + Base::size_of(p) + 4 * lane(); }
  // Of a block of fields v and one of channels, and fields u of outputs.
  static IST_HOST_DEVICE constexpr int of_theta(int path, int block, int channel, int two_fields) {
    return ((path * Tiles::passes + block * Tiles::channels + channel) * (S::fields / 2) + two_fields) * 128;
  }
  static IST_HOST_DEVICE constexpr int of_constant(int block, int out_block) {
    return constant + (block * Tiles::blocks + out_block) * 128;
  }
  // ---- a block's row of gradients, by all its threads, with barriers

  __device__ __forceinline__ void add_warps(int warps) const { Base::add_warps(warps, Base::size_of(p) + aside); }

  // Single sums: of θ [path, u, v, w]; of the constant hidden feature [which, u, v].
  __device__ __forceinline__ float theta_sum(int path, int u, int v, int w) const {
    const int row = Tiles::rows_are_channels ? w : v % 8, column = Tiles::rows_are_channels ? v : w % 8;
    return memory[of_theta(path, v / 8, w / 8, u / 2) + 4 * (4 * row + column / 2) + u % 2 * 2 + column % 2];
  }
  __device__ __forceinline__ float constant_sum(int which, int u, int v) const {
    return memory[of_constant(v / 8, u / 8) + 4 * (4 * (v % 8) + u % 8 / 2) + u % 2 * 2 + which];
  }
  // row: [n_grad]
  __device__ __forceinline__ void write(const FieldView& view, const float* packed, const typename S::Mlp& mlp,
                                        float* row) const {
    this->clear_row(row);
    write_theta(view, mlp, row);
    this->write_layers(view, packed, row);
    if constexpr (!S::Mlp::is_table)
      if (p.has_norms) write_last_norm(view, packed, row);
    this->write_shell(packed, row);
  }

 private:
  __device__ __forceinline__ void write_theta(const FieldView& view, const typename S::Mlp& mlp, float* row) const {
    constexpr int fields = S::fields * S::fields;
#pragma unroll 1
    for (int k = threadIdx.x; k < Slots::paths * fields; k += blockDim.x) {
      const int path = k / fields, u = k / S::fields % S::fields, v = k % S::fields;
      const FieldWeight weight = global_memory(view.theta)[k];
      if (weight.at < 0) continue;
      const float constant = path < 2 ? constant_sum(path, u, v) : 0;
#pragma unroll
      for (int w = 0; w < S::width; ++w)
        row[weight.at + w] = weight.ratio * (theta_sum(path, u, v, w) * mlp.scale[w] + constant * mlp.shift[w]);
    }
    for (int k = threadIdx.x; k < 2 * fields; k += blockDim.x) {
      const FieldWeight weight = global_memory(view.constant)[k];
      if (weight.at >= 0)
        row[weight.at] = weight.ratio * constant_sum(k / fields, k / S::fields % S::fields, k % S::fields);
    }
  }

  __device__ __forceinline__ void write_last_norm(const FieldView& view, const float* packed, float* row) const {
    for (int at = threadIdx.x / 32; at < 2 * S::width; at += block_threads() / 32) {
      const bool is_shift = at >= S::width;
      if (is_shift && !p.n_trivial) continue;
      const float sum = of_last_norm(view, packed, at % S::width, is_shift);
      if (lane() == 0) row[p.layers[p.n_layers - 1].affine + at] = sum;
    }
  }
  // By θ, at channel w, by all lanes of a warp.
  __device__ __forceinline__ float of_last_norm(const FieldView& view, const float* packed, int w,
                                                bool is_shift) const {
    constexpr int fields = S::fields * S::fields;
    const int n = (is_shift ? 2 : Slots::paths) * fields;
    float sum = 0;
    for (int k = lane(); k < n; k += 32) {
      const FieldWeight weight = global_memory(view.theta)[k];
      if (weight.at < 0) continue;
      const int path = k / fields, u = k / S::fields % S::fields, v = k % S::fields;
      sum += weight.ratio * packed[weight.at + w] * (is_shift ? constant_sum(path, u, v) : theta_sum(path, u, v, w));
    }
    return sum_lanes(sum, 1, 32);
  }
};

}  // namespace implicit_steer::IST_ISA
