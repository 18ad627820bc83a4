// Forward of a layer of scalars and vectors with exact sampling, in one kernel: out_i = Σ_path θ_path T_i[path], T as
// in exact_warp.cuh. A node whose edges several warps share gets a row of outputs from each of them, as in forward.cuh.
// Mean and bias follow, and the sum of such rows, here where the call says what for, else in mean_and_bias.
#pragma once

#include "exact_warp.cuh"

namespace implicit_steer::IST_ISA {

// Of a warp's shared memory.
template <typename S>
constexpr int kExactForwardSize = ExactMemory<S>::warp + ExactMemory<S>::aside;

// Base: what makes a chunk's records and adds its edges to T.
template <typename S, typename Base = ExactWarp<S>>
struct ExactForward : Base {
  using Base::a, Base::p, Base::view, Base::lane, Base::group, Base::pair, Base::number, Base::first, Base::last;
  using Base::theta, Base::constant, Base::sums, Base::constant_sums;
  using typename Base::Slots, typename Base::Tiles;
  static constexpr int kFirstAside = ExactMemory<S>::first_aside;
  const FieldCall& call;
  float* const aside;  // this lane's place

  __device__ __forceinline__ explicit ExactForward(const FieldCall& call)
      : Base(call, kExactForwardSize<S>), call(call), aside(this->rest() + 4 * lane) {}

  // ---- the node's outputs

  // Σ θ T, and all lanes' shares of it: 8 fields of 4 outputs at a time. Lane 4 u + k ends with output k of field u,
  // which goes to the node's row of the output or, of a node that several warps share, to one of this warp's.
  __device__ __forceinline__ void finish(int node, int end, bool shared, bool leading) {
    float* const out = shared ? call.partial + int64_t{2 * number + !leading} * p.out_size : row(node);
#pragma unroll 1
    for (int first_field = 0; first_field < S::fields; first_field += 8) {
      // Row n of a lane's shares is of field n ^ group, so that all lanes keep and send the same rows.
      float shares[4][4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float upper[4];
        mix(first_field + (n ^ group), shares[n]), mix(first_field + ((n + 4) ^ group), upper);
#pragma unroll
        for (int k = 0; k < 4; ++k) shares[n][k] += from_lane_xor(upper[k], 16);
      }
#pragma unroll
      for (int rows = 2; rows >= 1; rows /= 2)
#pragma unroll
        for (int n = 0; n < rows; ++n)
#pragma unroll
          for (int k = 0; k < 4; ++k) shares[n][k] += from_lane_xor(shares[n + rows][k], 4 * rows);
      const float even = exchange(shares[0][0], shares[0][2], 2), odd = exchange(shares[0][1], shares[0][3], 2);
      const float sum = exchange(even, odd, 1);
      const int to = global_memory(view.out)[4 * first_field + lane];
      if (to >= 0) out[to] = shared || !call.bias ? sum : finished(sum, node, end, to);
    }
  }

  __device__ __forceinline__ float* row(int node) const { return a.out + int64_t{node} * p.out_size; }
  __device__ __forceinline__ int begin_of(int node) const { return this->index(a.rowptr, node); }

  // Output k of a node from its sum over the edges before position `end`.
  __device__ __forceinline__ float finished(float sum, int node, int end, int k) const {
    if (call.mean) sum *= reciprocal_approximate(static_cast<float>(end - begin_of(node)));
    return sum + call.bias[k];
  }

  // Of the warps that share the node, the last one to have its row there adds all of them up, in their order.
  __device__ __forceinline__ void add_rows(int node, int end) const {
    const int begin = begin_of(node), per_warp = static_cast<int>(call.shape.edges_per_warp);
    const int n = (end < last ? end : last) - (begin > first ? begin : first);  // edges of this warp's row
    int from = number, others = 0;
    while (from * per_warp > begin) --from;
    __syncwarp();
    if (lane == 0) {
      __threadfence();
      others = atomicAdd(call.arrivals + from, n);
      __threadfence();
    }
    others = from_lane(others, 0);
    __syncwarp();
    if (others + n < end - begin) return;
    for (int k = lane; k < p.out_size; k += 32) {
      float sum = 0;
      for (int warp = from; warp * per_warp < end; ++warp)
        sum += call.partial[int64_t{2 * warp + (begin > warp * per_warp)} * p.out_size + k];
      row(node)[k] = finished(sum, node, end, k);
    }
  }

  // The outputs of nodes without edges: all warps together have them, one for each lane at a time.
  __device__ __forceinline__ void write_bare_nodes() const {
    const int64_t step = int64_t{32} * call.shape.warps;
    for (int64_t at = 32 * number + lane; at < a.n_dst; at += step) {
      const int node = static_cast<int>(at);
      if (begin_of(node) != begin_of(node + 1)) continue;
      for (int k = 0; k < p.out_size; ++k) row(node)[k] = call.bias[k];
    }
  }

  // Lanes without the bit get the sum of `lower` over a lane and its partner, lanes with it that of `upper`.
  __device__ __forceinline__ float exchange(float lower, float upper, int bit) const {
    const bool is_upper = lane & bit;
    return (is_upper ? upper : lower) + from_lane_xor(is_upper ? lower : upper, bit);
  }

  // This lane's share of the outputs (scalar, x, y, z) of field u.
  __device__ __forceinline__ void mix(int u, float* out) const {
    const float* const of_u = theta + u * S::fields * S::width + 8 * group + 2 * pair;
#pragma unroll
    for (int block = 0; block < Tiles::blocks; ++block) {
      const float* const one = constant + u * S::fields + 8 * block + group;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float weight = one[k == 0 ? 0 : S::fields * S::fields];
        out[k] = (block ? out[k] : 0) + weight * constant_sums[block][k];
      }
#pragma unroll
      for (int path = 0; path < Slots::paths; ++path) {
#pragma unroll
        for (int channel = 0; channel < Tiles::channels; ++channel) {
          const auto two = neighbours<2>(of_u + Tiles::theta_of(path, block, channel));
#pragma unroll
          for (int slot = 0; slot < Slots::count; ++slot) {
            if (Slots::path(slot) != path) continue;
            const float* const t = &sums[Tiles::tile(slot, block, channel)][Tiles::row(slot, block) % 2 * 2];
#pragma unroll
            for (int i = 0; i < 2; ++i) out[Slots::component(slot)] += two.at[i] * t[i];
          }
        }
      }
    }
  }

  __device__ __forceinline__ void walk() {
    if (a.node_sums && number == 0 && lane == 0)
      edges_of_node_sums(a) = static_cast<int32_t>(call.shape.edges_per_warp);
    int node = this->target(first), end = this->index(a.rowptr, node + 1);
    bool leading = true;   // the node is the warp's first one: some of its edges may be in an earlier warp
    bool goes_on = false;  // the node has edges in an earlier chunk
#pragma unroll 1
    for (int from = first; from < last; from += Base::of_chunk) {  // loop: chunks
      const int n = last - from < Base::of_chunk ? last - from : Base::of_chunk;
      this->chunk(from, n, NothingKept{});
      if (goes_on)
        this->template take_back<kFirstAside>(aside);
      else
        this->clear();
      for (int at = 0; at < n;) {  // loop: nodes
        const bool ends = end - from <= n;
        const int stop = ends ? end - from : n;
        add_edges(*this, at, stop);
        at = stop;
        goes_on = !ends && from + n < last;
        if (goes_on) {
          this->template put_aside<kFirstAside>(aside);
          break;
        }
        const bool shared = !ends || (leading && begin_of(node) < first);
        if (a.node_sums) this->put_aside(global_memory(node_sums_of<S>(a, node, number)) + 4 * lane);
        finish(node, end, shared, leading);
        if (shared && call.bias) add_rows(node, end);
        this->clear(), leading = false;
        while (from + at < last && end == from + at) end = this->index(a.rowptr, ++node + 1);
      }
      __syncwarp();
    }
    if (call.bias) write_bare_nodes();
  }
};

// Threads of a block and blocks of a multiprocessor: of large ones all in one, with 168 registers for each thread, of
// many channels with 255; of tables 128 are enough.
template <typename S>
constexpr int kExactForwardThreads = S::width > 8 ? 256
                                     : S::large   ? 384
                                                  : kThreads;
template <typename S>
constexpr int kExactForwardResident = S::large           ? 1
                                      : S::Mlp::is_table ? 4
                                                         : kResident<float>;

template <typename S>
__global__ void __launch_bounds__(kExactForwardThreads<S>, kExactForwardResident<S>)
    exact_forward(const __grid_constant__ FieldCall call) {
  ExactForward<S> warp(call);
  if (warp.number < call.shape.warps) warp.walk();
}

}  // namespace implicit_steer::IST_ISA
