// Forward of a layer of scalars and vectors whose hidden channels are sampled on a grid of the sphere, in one kernel:
// the MLP of 16 edges after the other (grid_mlp.cuh), and sums over the edges of a node as in exact_warp.cuh.
//
// The hidden features of an edge are, of every channel w, one number h, a symmetric matrix Q and a vector d; a field v
// of the inputs is f = (s, x):
//
//   T[w, v] += h s, h x, d · x, d s, Q x        A[(slot, w), edge] = h, d or Q,   B[edge, v] = s or a component of x
//
// so that T's rows are channels and its columns fields.
#pragma once

#include "exact_forward.cuh"
#include "grid_mlp.cuh"

namespace implicit_steer::IST_ISA {

template <typename F, int kWidth, int kFields>
struct ExactTiles<Grid<F, kWidth, kFields>> {
  // Tiles: Q x of x and y; of z, and d · x; h s and d s of x; of y and z; three of h x, with 8 rows each
  static constexpr int blocks = 1, channels = 1, passes = 1, count = 7;
  static constexpr bool rows_are_channels = true;
  static IST_HOST_DEVICE constexpr int tile(int slot, int, int) {
    return slot == 0 || slot == 5 ? 2 : slot < 4 ? 3 + slot : slot == 4 || slot == 10 ? 1 : slot < 8 ? 3 : 0;
  }
  static IST_HOST_DEVICE constexpr int row(int slot, int) { return slot == 4 || slot == 5 || slot == 7 || slot == 9; }
  // Place of number k of θ [path, u, v, w]: as [path, u, w, v]
  static IST_HOST_DEVICE constexpr int theta_at(int k) {
    return k - k % (kFields * kWidth) + k % kWidth * kFields + k / kWidth % kFields;
  }
  static IST_HOST_DEVICE constexpr int theta_of(int path, int, int) { return path * kFields * kFields * kWidth; }
};

template <typename F, int kWidth, int kFields>
struct ExactMemory<Grid<F, kWidth, kFields>> {
  using S = Grid<F, kWidth, kFields>;
  static constexpr int theta = S::Slots::paths * kFields * kFields * kWidth, constant = 2 * kFields * kFields;
  static constexpr int numbers = kFields + 4;
  static constexpr int exponent_at = theta + constant + kFields, warps_at = theta + constant + numbers;
  static constexpr int records = GridState::size;                          // the state
  static constexpr int warp = records + 32;                                // and of 16 edges sources and radial factors
  static constexpr int first_aside = ExactTiles<S>::count + 1, aside = 0;  // T stays in registers
  static IST_HOST_DEVICE constexpr int in_front_of_mlp(int warps, int of_warp) {
    return theta + constant + numbers + warps * of_warp;
  }
};

template <typename S>
struct GridWarp : ExactWarp<S> {
  using Base = ExactWarp<S>;
  using Base::a, Base::lane, Base::group, Base::pair, Base::mlp, Base::records, Base::sources, Base::sums;
  using Base::constant_sums;
  static constexpr int of_chunk = GridState::edges;
  using Base::Base;

  __device__ __forceinline__ float* factors() const { return reinterpret_cast<float*>(sources + of_chunk); }

  // What couplings read of the n edges at positions begin ..; lanes without an edge take the last one. `keep`: of
  // GridMlp.
  template <typename Keep>
  __device__ __forceinline__ void chunk(int begin, int n, Keep keep) {
    GridMlp::Inputs inputs{};
    inputs.attributes = a.attr;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = group + 8 * i;
      const int edge = this->index(a.order, begin + (at < n ? at : n - 1));
      inputs.x[i] = pair < 3 ? a.delta[int64_t{3} * edge + pair] : 0;
      inputs.edge[i] = edge;
      inputs.factor[i] = this->radial(sum_lanes(inputs.x[i] * inputs.x[i], 1, 4));
      if (pair == 0) sources[at] = this->index(a.src, edge), factors()[at] = inputs.factor[i];
    }
    mlp.template evaluate<S>(inputs, keep, records);
    __syncwarp();
  }

  // T += the sum over edges at .. at + 7 of the chunk before `stop`, all into one node.
  __device__ __forceinline__ void step(int at, int stop) {
    Two h, q[6], d[3], f[4];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool there = at + pair + 4 * e < stop;
      const int place = there ? at + pair + 4 * e : at;
      const float* const record = records + GridState::of_edge(place) + group * GridState::channel;
      const auto first = neighbours<4>(record), second = neighbours<4>(record + 4), third = neighbours<4>(record + 8);
      h.of[e] = first.at[0];
#pragma unroll
      for (int k = 0; k < 3; ++k) q[k].of[e] = first.at[1 + k], q[3 + k].of[e] = second.at[k], d[k].of[e] = third.at[k];
      const float factor = factors()[place];
      float field[4];
      this->field(row_of(a.x + this->scalars[group], sources[place], this->p.in_size), group, field);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        f[k].of[e] = there ? field[k] : 0;
        constant_sums[0][k] += factor * f[k].of[e];
      }
    }
    constexpr int of_x[3][3] = {{0, 3, 4}, {3, 1, 5}, {4, 5, 2}};  // of Q's components
    add(sums[2], h, d[0], f[0]), add(sums[3], d[1], d[2], f[0]);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      add(sums[0], q[of_x[k][0]], q[of_x[k][1]], f[1 + k]), add(sums[1], q[of_x[k][2]], d[k], f[1 + k]);
      add(sums[4 + k], h, {}, f[1 + k]);
    }
  }

 private:
  // Numbers of this lane's two edges.
  struct Two {
    float of[2];
  };

  // T of two slots += the products of `upper` and of `lower` with `b`.
  static __device__ __forceinline__ void add(float (&sum)[4], Two upper, Two lower, Two b) {
    Split<4> rows;
    Split<2> columns;
#pragma unroll
    for (int e = 0; e < 2; ++e)
      rows.place(2 * e, upper.of[e]), rows.place(2 * e + 1, lower.of[e]), columns.place(e, b.of[e]);
    mma_3xtf32(sum, rows, columns);
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads, kResident<float>) grid_forward(const __grid_constant__ FieldCall call) {
  ExactForward<S, GridWarp<S>> warp(call);
  if (warp.number < call.shape.warps) warp.walk();
}

}  // namespace implicit_steer::IST_ISA
