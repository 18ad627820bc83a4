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
  using Base::a, Base::p, Base::view, Base::lane, Base::group, Base::pair, Base::mlp, Base::records, Base::sources;
  using Base::edges, Base::moved, Base::of_constant, Base::kept, Base::gradients, Base::need_weights;
  using Base::need_geometry;
  static constexpr int channel = GridState::channel;
  static IST_HOST_DEVICE int size_behind_mlp() { return GridMlp::n_fragments * GridMlp::fragment; }

  __device__ __forceinline__ float* transposed() const { return mlp.shift + S::width; }  // fragments

  __device__ __forceinline__ explicit GridBackward(const FieldCall& call) : Base(call) {
    const int left = call.shape.warps - this->number;  // what is kept of all warps is in front of their sums
    kept = {this->along};
    if (lane == 0) kept.place(call.sums - int64_t{left} * KeptLayers<S>::size(p));
    GridMlp::copy_fragments(p, *global_memory(view.grid), GridMlp::transposed, transposed());
    __syncthreads();
  }

  // ---- the edges of a node

  // Edges at .. of the chunk before `stop`, all into one node: first what needs h, Q and d, then what replaces them.
  __device__ __forceinline__ void edges_back(int at, int stop) {
    if (a.grad_edge) {
      Fragments b;
      load<true>(b);
#pragma unroll 1
      for (int begin = at; begin < stop; begin += 8) fields_back(begin, stop, b);  // loop: fields
    }
    if (!need_weights && !need_geometry()) return;
    Fragments b;
    load<false>(b);
#pragma unroll 1
    for (; at < stop; at += 8) hidden_back(at, stop, b);  // loop: hidden
  }

 private:
  // Places of Q's components (xx, yy, zz, xy, xz, yz) behind h, and of d.
  static constexpr int of_d = 8;
  static __device__ __forceinline__ constexpr int of_q(int k, int l) { return k == l ? 1 + k : 3 + k + l; }

  // Of each slot dT as a fragment of B: [v, w], or [w, v] to multiply h, Q and d with. A row's element t is v or w =
  // 2 t, element t + 4 the next one.
  using Fragments = Split<2>[Base::Slots::count];
  template <bool kByChannel>
  __device__ __forceinline__ void load(Fragments& b) const {
#pragma unroll
    for (int slot = 0; slot < Base::Slots::count; ++slot)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = kByChannel ? 2 * pair + i : group, column = kByChannel ? group : 2 * pair + i;
        b[slot].place(i, this->d_t[slot * Base::square + row * S::width + column]);
      }
  }

  // What a lane has of its edge: h, Q and d of channels 2 t and 2 t + 1.
  struct Mine {
    int place;
    bool there;
    float* record;
    float hidden[2][12];
  };
  __device__ __forceinline__ Mine mine_of(int at, int stop) const {
    Mine mine{};
    mine.there = at + group < stop, mine.place = mine.there ? at + group : at;
    mine.record = records + GridState::of_edge(mine.place) + 2 * pair * channel;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int k = 0; k < 12; k += 4) {
        if (!mine.there) continue;
        const auto four = neighbours<4>(mine.record + i * channel + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) mine.hidden[i][k + j] = four.at[j];
      }
    return mine;
  }

  // The gradients of the features of edges at .. at + 7.
  __device__ __forceinline__ void fields_back(int at, int stop, const Fragments& b) const {
    const Mine mine = mine_of(at, stop);
    float sums[4][4] = {};
#pragma unroll
    for (int n = 0; n < 11; ++n) {
      if (n == 7) continue;
      Stacked one;
      one.place(0, mine.hidden[0][n]), one.place(1, mine.hidden[1][n]);
      if (n == 0) {
#pragma unroll
        for (int k = 0; k < 4; ++k) mma_stacked(sums[k], one, b[k]);
      } else if (n >= of_d) {
        mma_stacked(sums[1 + n - of_d], one, b[4]);
        mma_stacked(sums[0], one, b[5 + n - of_d]);
      } else {
#pragma unroll
        for (int k = 0; k < 3; ++k)
#pragma unroll
          for (int l = 0; l < 3; ++l)
            if (of_q(k, l) == n) mma_stacked(sums[1 + l], one, b[8 + k]);
      }
    }
    if (!mine.there) return;
    const float factor = this->factors()[mine.place];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto d = neighbours<4>(of_constant + 8 * pair + 4 * i);
      float d_f[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) d_f[k] = sums[k][i] + sums[k][2 + i] + d.at[k] * factor;
      this->store_field(edges[mine.place], 2 * pair + i, d_f, true);
    }
  }

  // The gradients of h, Q and d of edges at .. at + 7 into their records, and P.
  __device__ __forceinline__ void hidden_back(int at, int stop, const Fragments& b) const {
    const Mine mine = mine_of(at, stop);
    const float* const x = row_of(a.x, sources[mine.place], p.in_size);
    Stacked fields[4];
    float product = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float f[4];
      this->field(x + this->scalars[2 * pair + i], 2 * pair + i, f);
      const auto d = neighbours<4>(of_constant + 8 * pair + 4 * i);
#pragma unroll
      for (int k = 0; k < 4; ++k) fields[k].place(i, f[k]), product += d.at[k] * f[k];
    }
    product *= this->factors()[mine.place];
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
          for (int k = 0; k < 4; ++k) mma_stacked(sum, fields[k], b[k]);
        } else if (n >= of_d) {
          mma_stacked(sum, fields[1 + n - of_d], b[4]);
          mma_stacked(sum, fields[0], b[5 + n - of_d]);
        } else {
#pragma unroll
          for (int k = 0; k < 3; ++k)
#pragma unroll
            for (int l = 0; l < 3; ++l)
              if (of_q(k, l) == n) mma_stacked(sum, fields[1 + l], b[8 + k]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) d[i].at[j] = sum[i] + sum[2 + i], product += mine.hidden[i][n] * d[i].at[j];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (mine.there) neighbours<4>(mine.record + i * channel + 4 * quad) = d[i];
    }
    const float whole = sum_lanes(product, 1, 4);
    if (mine.there && pair == 0) moved[4 * mine.place + 3] = whole;
  }

 public:
  // ---- the MLP and the positions: lane 4 g + t has edges g and g + 8

  __device__ __forceinline__ void reverse(int n) {
    const GridMlpBackward<S> back{mlp, transposed(), kept};
    float d_x[2] = {0, 0};
    if (mlp.n_layers > 1) layers_back(n, back, d_x);
    const GridMlp::Inputs inputs = inputs_of(n);
    if (mlp.n_layers > 1)
      back.template activations<true, false>(0, inputs, records, d_x);
    else
      back.template activations<true, true>(0, inputs, records, d_x);
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
  // Read when they are wanted: kept, they would take registers.
  __device__ __forceinline__ GridMlp::Inputs inputs_of(int n) const {
    GridMlp::Inputs inputs{};
    inputs.attributes = a.attr;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = group + 8 * i;
      inputs.edge[i] = edges[at], inputs.factor[i] = at < n ? this->factors()[at] : 0;
      inputs.x[i] = pair < 3 ? a.delta[int64_t{3} * inputs.edge[i] + pair] : 0;
    }
    return inputs;
  }

  // All layers but the first one.
  __device__ __forceinline__ void layers_back(int n, const GridMlpBackward<S>& back, float (&d_x)[2]) const {
    int layer = mlp.n_layers - 1;
    back.template activations<false, true>(layer, inputs_of(n), records, d_x);
#pragma unroll 1
    for (;; back.template activations<false, false>(layer, {}, records, d_x)) {
      __syncwarp();
      if (need_weights) add_weights(layer);
      __syncwarp();
      back.linear(layer, records);
      __syncwarp();
      if (--layer == 0) break;
    }
  }

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
        auto& to = gradients.four(gradients.of_weights(layer, slots + 4 * half, 0, 0));
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
              rows.place(i, d_z[e + i][2 * half + k]), columns.place(i, y[e + i].at[2 * half + k]);
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
    const float constant_sample = GridMlp::constant_sample(p, *global_memory(view.grid));
    if (need_weights) {
      sum(0) += bias * constant_sample;
#pragma unroll
      for (int k = 0; k < 3; ++k) sum(1 + k) += weights[k];
    }
#pragma unroll 1
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

// All warps of a multiprocessor are in one block, which has fragments and weights once. From sm_100 on the code needs
// more registers than 12 warps leave to each.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kGridBackwardThreads = 256;
#else
constexpr int kGridBackwardThreads = 384;
#endif

template <typename S>
__global__ void __launch_bounds__(kGridBackwardThreads, 1) grid_backward(const __grid_constant__ FieldCall call) {
  GridBackward<S> warp(call);
  run_warps<S>(warp, call);
}

}  // namespace implicit_steer::IST_ISA
