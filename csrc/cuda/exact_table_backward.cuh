// The end of an exact backward pass through a table: from the gradients of c_l those of the splines' coefficients, edge
// by edge into the warp's own sums, and by way of u that of the radius.
#pragma once

#include "exact_reverse.cuh"
#include "exact_table.cuh"

namespace implicit_steer::IST_ISA {

template <typename S>
struct KeptLayers<S, true> {
  typename S::Number* memory;
  static constexpr int of_layer = 0;
};

// Base: an ExactReverse.
template <typename S, typename Base>
struct ExactTableReverse : Base {
  using Base::a, Base::p, Base::lane, Base::mlp, Base::records, Base::gradients, Base::need_weights;
  using Base::Base;
  using typename Base::N, typename Base::Slots, typename Base::Memory;

  __device__ __forceinline__ void reverse(int n) {
    const bool there = lane < n;
    const int64_t edge = this->edges[lane];
    const auto g = this->geometry(edge);
    const auto here = mlp.template cell<S>(g.radius, [&](int j) { return this->attribute(edge, j); });
    N* const record = records + lane * Memory::record;
    auto& geometry = neighbours<4>(record + Slots::degrees * S::width);
    const N factor = there ? geometry.at[3] : N{};
    // For add_to_table(), in the place of what is not read any more.
    const auto& weights = here.pieces.weights;
    geometry = {weights[0], weights[1], weights[2], weights[3]}, this->sources[lane] = here.first;
    N d_u{};
#pragma unroll
    for (int l = 0; l < Slots::degrees; ++l) {
      const N power = mlp.power(here.u, l), slope = mlp.power_slope(here.u, l);
#pragma unroll
      for (int w = 0; w < S::width; w += 4) {
        auto& d = neighbours<4>(record + l * S::width + w);
        const auto f = mlp.template blend<S>(here.pieces.weights, here.first, l, w);
        const auto f_u = mlp.template blend<S>(here.pieces.slopes, here.first, l, w);
        Neighbours<N, 4> of_splines;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const N d_c = there ? d.at[j] * factor : N{};
          d_u += d_c * (slope * f.at[j] + power * f_u.at[j]), of_splines.at[j] = d_c * power;
        }
        d = of_splines;
      }
    }
    __syncwarp();
    if (need_weights) add_to_table(__popc(__ballot_sync(kWarp, there)));  // n would take a register
    if (!there) return;
    const auto of_direction = this->of_direction();
    if (need_weights) gradients.one(gradients.shell) += of_direction.at[3] * g.squared;
    if (!this->need_geometry()) return;
    this->store_position(edge, g, of_direction, d_u * here.per_radius);
    for (int j = 0; j < p.n_attr && a.grad_attr; ++j) global_memory(a.grad_attr)[edge * p.n_attr + j] = 0;
  }

  // The first n edges' records times the weights of their splines; a lane has the same numbers of every row.
  __device__ __forceinline__ void add_to_table(int n) const {
    const int row = mlp.template row_size<S>();
#pragma unroll 1
    for (int at = 0; at < n; ++at) {
      const N* const record = records + at * Memory::record;
      N* const rows = gradients.memory + gradients.first + this->sources[at];
      const auto weights = neighbours<4>(record + Slots::degrees * S::width);
#pragma unroll
      for (int x = lane; x < Slots::degrees * S::width; x += 32)
        if (x < row)
#pragma unroll
          for (int j = 0; j < 4; ++j) rows[j * row + x] += weights.at[j] * record[x];
    }
    __syncwarp();
  }
};

}  // namespace implicit_steer::IST_ISA
