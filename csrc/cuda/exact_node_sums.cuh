// The gradients of θ from the T of every node that a forward pass kept (ConvArgs.node_sums), so that a backward pass
// need not sum it once more. A warp has a share of the nodes, neighbouring ones; its sums over them, which are those of
// ExactBackward::add_theta(), stay in registers.
#pragma once

#include "exact_gradients.cuh"

namespace implicit_steer::IST_ISA {

template <typename S>
struct NodeSumGradients {
  using Slots = typename S::Slots;
  using Tiles = ExactTiles<S>;
  static constexpr int together = 31;  // nodes whose edges' positions the lanes hold at once, with where they end
  const FieldCall& call;
  const ConvArgs<float>& a;
  float* const grad;         // [8, 4] of the warp's shared memory
  const int lane, from, to;  // nodes

  __device__ __forceinline__ NodeSumGradients(const FieldCall& call, float* grad)
      : call(call),
        a(call.args),
        grad(grad),
        lane(thread_of_block() % 32),
        from(share() * warp_number()),
        to(n_nodes() - from < share() ? n_nodes() : from + share()) {}
  static __device__ __forceinline__ int warp_number() {
    return static_cast<int>(blockIdx.x * (block_threads() / 32) + thread_of_block() / 32);
  }
  __device__ __forceinline__ int n_nodes() const { return static_cast<int>(a.n_dst); }
  __device__ __forceinline__ int share() const { return (n_nodes() + call.shape.warps - 1) / call.shape.warps; }
  __device__ __forceinline__ int position(int node) const {
    return a.index64 ? static_cast<int>(static_cast<const int64_t*>(a.rowptr)[node])
                     : static_cast<const int32_t*>(a.rowptr)[node];
  }

  __device__ __forceinline__ void add() const {
    if (warp_number() >= call.shape.warps) return;
#pragma unroll 1
    for (int pass = 0; pass < Tiles::passes * Tiles::blocks; ++pass) {
      const int tiles = pass / Tiles::blocks;
      add(tiles / Tiles::channels, tiles % Tiles::channels, pass % Tiles::blocks);
    }
  }

 private:
  // What a lane has of a row: T of a block of fields and one of channels, and of the constant hidden feature; and one
  // output's gradient of the row's node.
  struct Row {
    float t[Slots::count][2], constant[4], grad;
  };
  __device__ __forceinline__ Row load(int node, int row, int block, int channel, int output) const {
    const float* const sums = global_memory(node_sums_of<S>(a, node, row)) + 4 * lane;
    Row r;
#pragma unroll
    for (int slot = 0; slot < Slots::count; ++slot) {
      const auto two = neighbours<2>(sums + 128 * Tiles::tile(slot, block, channel) + Tiles::row(slot, block) % 2 * 2);
      r.t[slot][0] = two.at[0], r.t[slot][1] = two.at[1];
    }
    const auto four = neighbours<4>(sums + 128 * (Tiles::count + block));
#pragma unroll
    for (int k = 0; k < 4; ++k) r.constant[k] = four.at[k];
    r.grad = output < 0 ? 0 : a.grad_out[int64_t{node} * call.plan.out_size + output];
    return r;
  }

  // Sums of a block of fields, one of channels and one of outputs.
  struct Sums {
    float theta[Slots::paths][8][2] = {}, constant[4] = {};
  };
  __device__ __forceinline__ void add(int block, int channel, int out_block) const {
    const int output = global_memory(call.view.out)[32 * out_block + lane];
    const int per_row = edges_of_node_sums(a);
    Sums sums;
#pragma unroll 1
    for (int begin = from; begin < to; begin += together) {
      const int n = to - begin < together ? to - begin : together;
      const int at = position(begin + (lane < n ? lane : n));
      const int first = at / per_row, before = (at - 1) / per_row;  // warps that have the edge, and the one before
#pragma unroll 1
      for (int k = 0; k < n; ++k) {  // loop: kept sums
        const int of_node = from_lane(at, k + 1) - from_lane(at, k), last = from_lane(before, k + 1);
        if (of_node == 0) continue;
        int number = from_lane(first, k);
        Row row = load(begin + k, number, block, channel, output);
        while (++number <= last) add_row(row, load(begin + k, number, block, channel, output));
        __syncwarp();
        grad[lane] = call.mean ? row.grad * reciprocal_approximate(static_cast<float>(of_node)) : row.grad;
        __syncwarp();
        add(sums, row);
      }
    }
    write(sums, block, channel, out_block);
  }

  static __device__ __forceinline__ void add_row(Row& row, const Row& more) {
#pragma unroll
    for (int slot = 0; slot < Slots::count; ++slot)
      row.t[slot][0] += more.t[slot][0], row.t[slot][1] += more.t[slot][1];
#pragma unroll
    for (int k = 0; k < 4; ++k) row.constant[k] += more.constant[k];
  }

  __device__ __forceinline__ void add(Sums& sums, const Row& row) const {
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      const auto g = neighbours<4>(grad + 4 * u);
#pragma unroll
      for (int slot = 0; slot < Slots::count; ++slot)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          sums.theta[Slots::path(slot)][u][i] += g.at[Slots::component(slot)] * row.t[slot][i];
    }
    float whole[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) whole[k] = sum_lanes(row.constant[k], 1, 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto g = neighbours<4>(grad + 8 * (lane % 4) + 4 * i);
      sums.constant[2 * i] += g.at[0] * whole[0];
      sums.constant[2 * i + 1] += g.at[1] * whole[1] + g.at[2] * whole[2] + g.at[3] * whole[3];
    }
  }

  __device__ __forceinline__ void write(const Sums& sums, int block, int channel, int out_block) const {
    using Gradients = ExactGradients<S>;
    const Gradients gradients(call.sums, warp_number(), call.plan, call.view);
#pragma unroll
    for (int path = 0; path < Slots::paths; ++path)
#pragma unroll
      for (int u = 0; u < 8; u += 2)
        gradients.four(Gradients::of_theta(path, block, channel, 4 * out_block + u / 2)) = {
            sums.theta[path][u][0], sums.theta[path][u][1], sums.theta[path][u + 1][0], sums.theta[path][u + 1][1]};
    if (channel == 0)
      gradients.four(Gradients::of_constant(block, out_block)) = {sums.constant[0], sums.constant[1], sums.constant[2],
                                                                  sums.constant[3]};
  }
};

}  // namespace implicit_steer::IST_ISA
