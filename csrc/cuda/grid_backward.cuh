// Backward of a layer whose hidden channels are sampled on a grid of the sphere, in one kernel: as exact_backward.cuh,
// 16 edges after the other, with the reverse sweep of grid_mlp_backward.cuh. From a node's dT follow
//
//   d_h[w] = Σ_v dT s, dT x,   d_d[w] = Σ_v dT x, dT s,   d_Q[w] = Σ_v dT x        of every edge into it, and likewise
//   d_s[v] and d_x[v] as sums over w of dT times h, d and Q
//
// by the tensor cores, 8 edges at a time. Lane 4 g + t has edge g of a step, its fields and channels 2 t and 2 t + 1. T
// and dT have channels in the place of fields there, and fields in that of channels.
#pragma once

#include "exact_backward.cuh"
#include "grid_forward.cuh"
#include "grid_mlp_backward.cuh"

namespace implicit_steer::IST_ISA {

template <typename S>
struct GridBackward : ExactBackward<S, GridWarp<S>> {
  using Base = ExactBackward<S, GridWarp<S>>;
  using Base::a, Base::p, Base::exact, Base::lane, Base::group, Base::pair, Base::mlp, Base::records, Base::sources;
  using Base::edges, Base::moved, Base::of_constant, Base::kept, Base::gradients, Base::need_weights;
  using typename Base::Fragments;
  static constexpr int channel = GridState::channel;
  float* const transposed;  // fragments
  const float constant_sample;

  static IST_HOST_DEVICE int size_behind_mlp() { return GridMlp::n_fragments * GridMlp::fragment; }

  __device__ __forceinline__ explicit GridBackward(const ExactCall& call)
      : Base(call),
        transposed(mlp.shift + S::width),
        constant_sample(GridMlp::constant_sample(p, *global_memory(exact.grid))) {
    const int left = call.shape.warps - this->number;  // what is kept of all warps is in front of their sums
    kept = {call.sums - int64_t{left} * KeptLayers<S>::size(p)};
    GridMlp::copy_fragments(p, *global_memory(exact.grid), GridMlp::transposed, transposed);
    __syncthreads();
  }

  // ---- the edges of a node

  // Edges at .. at + 7 of the chunk before `stop`, all into one node.
  __device__ __forceinline__ void step_back(int at, int stop, const Fragments& b) {
    const int mine = at + group, place = mine < stop ? mine : at;
    const bool there = mine < stop;
    float* const record = records + GridState::of_edge(place) + 2 * pair * channel;
    const float* const x = a.x + int64_t{sources[place]} * p.in_size;
    float f[2][4], hidden[2][12] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      this->field(x, 2 * pair + i, f[i]);
#pragma unroll
      for (int k = 0; k < 12; k += 4) {
        if (!there) continue;
        const auto four = neighbours<4>(record + i * channel + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) hidden[i][k + j] = four.at[j];
      }
    }
    const float product = hidden_back(f, hidden, b, there, record);
    float d_f[2][4], of_factor = 0;
    fields_back(hidden, b, d_f);
    const float factor = this->factors()[place];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto d = neighbours<4>(of_constant + 8 * pair + 4 * i);
#pragma unroll
      for (int k = 0; k < 4; ++k) d_f[i][k] += d.at[k] * factor, of_factor += d.at[k] * f[i][k];
      if (there && a.grad_edge) this->store_field(edges[place], i, d_f[i]);
    }
    const float whole = sum_lanes(product + factor * of_factor, 1, 4);
    if (there && pair == 0) moved[4 * mine + 3] = whole;
  }

 private:
  // Places of Q's components (xx, yy, zz, xy, xz, yz) behind h, and of d.
  static constexpr int of_d = 8;
  static __device__ __forceinline__ constexpr int of_q(int k, int l) { return k == l ? 1 + k : 3 + k + l; }

  // The gradients of h, Q and d into the record; this lane's share of their products with them.
  __device__ __forceinline__ float hidden_back(const float (&f)[2][4], const float (&hidden)[2][12], const Fragments& b,
                                               bool there, float* record) const {
    Stacked fields[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) fields[k].set(0, f[0][k]), fields[k].set(1, f[1][k]);
    float product = 0;
#pragma unroll
    for (int quad = 0; quad < 3; ++quad) {
      Neighbours<float, 4> d[2] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = 4 * quad + j;
        if (n == 7 || n == 11) continue;
        float sum[4] = {0, 0, 0, 0};
        if (n == 0) {
#pragma unroll
          for (int k = 0; k < 4; ++k) mma_stacked(sum, fields[k], b.by_channel[k]);
        } else if (n >= of_d) {
          mma_stacked(sum, fields[1 + n - of_d], b.by_channel[4]);
          mma_stacked(sum, fields[0], b.by_channel[5 + n - of_d]);
        } else {
#pragma unroll
          for (int k = 0; k < 3; ++k)
#pragma unroll
            for (int l = 0; l < 3; ++l)
              if (of_q(k, l) == n) mma_stacked(sum, fields[1 + l], b.by_channel[8 + k]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) d[i].at[j] = sum[i] + sum[2 + i], product += hidden[i][n] * d[i].at[j];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (there) neighbours<4>(record + i * channel + 4 * quad) = d[i];
    }
    return product;
  }

  static __device__ __forceinline__ void fields_back(const float (&hidden)[2][12], const Fragments& b,
                                                     float (&d_f)[2][4]) {
    float sums[4][4] = {};
#pragma unroll
    for (int n = 0; n < 11; ++n) {
      if (n == 7) continue;
      Stacked one;
      one.set(0, hidden[0][n]), one.set(1, hidden[1][n]);
      if (n == 0) {
#pragma unroll
        for (int k = 0; k < 4; ++k) mma_stacked(sums[k], one, b.by_field[k]);
      } else if (n >= of_d) {
        mma_stacked(sums[1 + n - of_d], one, b.by_field[4]);
        mma_stacked(sums[0], one, b.by_field[5 + n - of_d]);
      } else {
#pragma unroll
        for (int k = 0; k < 3; ++k)
#pragma unroll
          for (int l = 0; l < 3; ++l)
            if (of_q(k, l) == n) mma_stacked(sums[1 + l], one, b.by_field[8 + k]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i) d_f[i][k] = sums[k][i] + sums[k][2 + i];
  }

 public:
  // ---- the MLP and the positions: lane 4 g + t has edges g and g + 8

  __device__ __forceinline__ void reverse(int n) {
    GridMlp::Inputs inputs;
    float d_x[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = group + 8 * i;
      const int64_t edge = edges[at];
      inputs.x[i] = pair < 3 ? a.delta[3 * edge + pair] : 0;
      inputs.attributes[i] = a.attr + edge * p.n_attr;
      inputs.factor[i] = at < n ? this->factors()[at] : 0;
    }
    const GridMlpBackward<S> back{mlp, transposed, kept};
    const auto add = [&](int layer) {
      if (need_weights) add_weights(layer);
    };
    back.reverse(inputs, add, records, d_x);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = group + 8 * i;
      const float squared = sum_lanes(inputs.x[i] * inputs.x[i], 1, 4), product = at < n ? moved[4 * at + 3] : 0;
      if (need_weights) gradients.one(ExactGradients<S>::shell) += pair == 0 ? product * squared : 0;
      if (a.grad_delta && at < n && pair < 3)
        global_memory(a.grad_delta)[3 * int64_t{edges[at]} + pair] =
            d_x[i] + this->radial_slope(product, squared) * inputs.x[i];
      if (pair < 3) moved[4 * at + pair] = inputs.x[i];
    }
    __syncwarp();
    if (need_weights || a.grad_attr) add_first(n);
    __syncwarp();
  }

 private:
  // Σ d_z yᵀ and Σ d_z over the chunk's edges: row g, columns 2 t and 2 t + 1, of every slot.
  __device__ __forceinline__ void add_weights(int layer) const {
    float bias = 0;
#pragma unroll 1
    for (int slots = 0; slots < 4; ++slots) {  // 2 slots, 2 slots + 1, 8 + 2 slots, 9 + 2 slots
      float d_z[4][4];                         // of four edges t, t + 4 ..
      Neighbours<float, 4> y[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int edge = pair + 4 * e;
        const float* const row = records + GridState::of_edge(edge) + group * channel + 2 * slots;
        const auto lower = neighbours<2>(row), upper = neighbours<2>(row + 8);
        d_z[e][0] = lower.at[0], d_z[e][1] = lower.at[1], d_z[e][2] = upper.at[0], d_z[e][3] = upper.at[1];
        y[e] = kept.slots(layer, kLayerInputs, group, edge / 8, 4 * (edge % 8) + slots);
        if (slots == 0) bias += d_z[e][0];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto& to = gradients.four(gradients.of_weights(layer, slots + 4 * half));
        Neighbours<float, 4> sum = to;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float d_w[4] = {sum.at[2 * k], sum.at[2 * k + 1], 0, 0};
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            Stacked rows;
            Split<2> columns;
#pragma unroll
            for (int i = 0; i < 2; ++i)
              rows.set(i, d_z[e + i][2 * half + k]), columns.set(i, y[e + i].at[2 * half + k]);
            mma_stacked(d_w, rows, columns);
          }
          sum.at[2 * k] = d_w[0] + d_w[2], sum.at[2 * k + 1] = d_w[1] + d_w[3];
        }
        to = sum;
      }
    }
    gradients.one(gradients.of_bias(layer)) += bias;
  }

  // The first layer's bias and weights and the gradients of attributes: lane 4 g + t has channel g of edges t, t + 4 ..
  __device__ __forceinline__ void add_first(int n) const {
    float of_constant_sum[4], bias = 0, weights[3] = {0, 0, 0};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = pair + 4 * e;
      const float* const row = records + GridState::of_edge(at) + group * channel;
      const auto first = neighbours<4>(row), second = neighbours<4>(row + 4), x = neighbours<4>(moved + 4 * at);
      of_constant_sum[e] = (first.at[1] + first.at[3]) + (second.at[1] + second.at[3]);
      bias += of_constant_sum[e];
      weights[0] += first.at[0] * x.at[0], weights[1] += first.at[2] * x.at[1], weights[2] += second.at[0] * x.at[2];
    }
    const auto sum = [&](int input) -> float& { return gradients.one(ExactGradients<S>::first + 32 * input); };
    if (need_weights) {
      sum(0) += bias * constant_sample;
#pragma unroll
      for (int k = 0; k < 3; ++k) sum(1 + k) += weights[k];
    }
    for (int j = 0; j < p.n_attr; ++j) {
      const float weight = mlp.scalars[(1 + j) * S::width + group];
      float of_attribute = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = pair + 4 * e;
        const int64_t place = int64_t{edges[at]} * p.n_attr + j;
        of_attribute += of_constant_sum[e] * a.attr[place];
        const float whole = sum_lanes(of_constant_sum[e] * weight, 4, 32);
        if (a.grad_attr && group == e && at < n) global_memory(a.grad_attr)[place] = whole;
      }
      if (need_weights) sum(4 + j) += of_attribute * constant_sample;
    }
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads, kResident<float>) grid_backward(const __grid_constant__ ExactCall call) {
  GridBackward<S> warp(call);
  run_warps<S>(warp, call);
}

}  // namespace implicit_steer::IST_ISA
