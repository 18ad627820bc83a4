// Backward of tile_layers.cuh: from the gradients of the edges' records those of the MLP's weights, of positions and of
// attributes. A warp makes a chunk's records once more, whose layers are kept, and goes back (exact_reverse.cuh).
#pragma once

#include <type_traits>

#include "exact_table_backward.cuh"
#include "layer_gradients.cuh"
#include "tile_layers.cuh"

namespace implicit_steer::IST_ISA {

// A warp's sums: of the last batch norm's scale and shift, [2, W, lane], then of what is before it.
template <typename S>
struct TileGradients : LayerGradients<S, 2 * S::width * 32> {
  using Base = LayerGradients<S, 2 * S::width * 32>;
  using typename Base::N;

  __device__ __forceinline__ TileGradients(N* of_warps, int number, const PlanView<float>& p, const FieldView& view)
      : Base(of_warps, number, Base::size_of(p), p, view) {}

  __device__ __forceinline__ N& of_norm(bool is_shift, int w) const {
    return this->one((is_shift * S::width + w) * 32);
  }

  // row: [n_grad]
  __device__ __forceinline__ void write(const FieldView& view, const N* packed, float* row) const {
    const PlanView<float>& p = this->p;
    this->clear_row(row);
    this->write_layers(view, packed, row);
    this->write_shell(packed, row);
    for (int k = threadIdx.x; k < 2 * S::width && p.has_norms; k += blockDim.x) {
      N sum{};
      for (int lane = 0; lane < 32; ++lane) sum += this->memory[k * 32 + lane];
      if (k < S::width || p.n_trivial) row[p.layers[p.n_layers - 1].affine + k] = result(sum);
    }
  }
};

template <typename S>
IST_HOST_DEVICE int tile_reverse_size(const PlanView<float>& p) {
  return ExactMemory<S>::warp + kReverseSize + (p.n_layers - 1) * KeptLayers<S>::of_layer;
}

template <typename S>
struct TileReverse : ExactReverse<S, ExactChunks<S>, TileGradients<S>> {
  using Base = ExactReverse<S, ExactChunks<S>, TileGradients<S>>;
  using Base::a, Base::p, Base::lane, Base::first, Base::last, Base::records, Base::mlp, Base::edges, Base::gradients;
  using typename Base::N, typename Base::Slots, typename Base::Memory;
  const N* const grad_rows;

  __device__ __forceinline__ explicit TileReverse(const FieldCall& call)
      : Base(call, tile_reverse_size<S>(call.plan)), grad_rows(reinterpret_cast<const N*>(call.records.grad)) {
    if constexpr (S::Mlp::is_table) __syncthreads();  // as in TileLayers
    this->kept = {this->rest() + kReverseSize};
  }

  // Self: this kernel, or one derived from it with a reverse() of its own.
  template <typename Self>
  __device__ __forceinline__ void run(Self& self) {
    if (this->need_weights) gradients.clear();
#pragma unroll 1
    for (int from = first; from < last; from += Base::of_chunk) {  // loop: chunks
      const int n = last - from < Base::of_chunk ? last - from : Base::of_chunk, at = lane < n ? lane : n - 1;
      edges[lane] = this->index(a.order, from + at);
      this->chunk(from, n, this->kept);
      of_record(grad_rows + int64_t{from + at} * Memory::record, lane < n);
      self.reverse(n);
    }
  }

  // Of this lane's edge: its record becomes the gradient of c in the record of the last activation; and what
  // ExactReverse reads of `moved` and `along`.
  __device__ __forceinline__ void of_record(const N* grad, bool there) const {
    N* const record = records + lane * Memory::record;
    const N factor = record[Memory::record - 1];
    const auto moved = neighbours<4>(grad + Memory::record - 4);
    N parts[2] = {}, of_factor = moved.at[3];  // of l = 0 and of others
#pragma unroll(4)
    for (int w = 0; w < S::width; ++w) {
      N of_scale{};
#pragma unroll
      for (int l = 0; l < Slots::degrees; ++l) {
        N& c = record[l * S::width + w];
        const N d = grad[l * S::width + w], product = c * d;
        of_scale += product, parts[l > 0] += product * mlp.scale[w];
        if (l == 0) of_factor += d * mlp.shift[w];
        c = d * mlp.scale[w];
      }
      if (this->need_weights && there && p.has_norms) {
        gradients.of_norm(false, w) += of_scale;
        gradients.of_norm(true, w) += grad[w] * factor;
      }
    }
    neighbours<4>(this->moved + 4 * lane) = {moved.at[0], moved.at[1], moved.at[2],
                                             parts[0] + parts[1] + factor * of_factor};
    this->along[lane] = parts[1];
  }
};

template <typename S>
using TileReverseWarp = std::conditional_t<S::Mlp::is_table, ExactTableReverse<S, TileReverse<S>>, TileReverse<S>>;

template <typename S>
__global__ void __launch_bounds__(kThreads, 2) tile_layers_backward(const __grid_constant__ FieldCall call) {
  TileReverseWarp<S> warp(call);
  if (warp.number < call.shape.warps) warp.run(warp);
  if (!warp.need_weights) return;
  const int warps = blockDim.x / 32, begin = blockIdx.x * warps, left = call.shape.warps - begin;
  const TileGradients<S> of_block(reinterpret_cast<typename S::Number*>(call.sums), begin, warp.p, warp.view);
  of_block.add_warps(left < warps ? left : warps, of_block.size_of(warp.p));
  of_block.write(warp.view, warp.weights(), call.partial + int64_t{blockIdx.x} * warp.p.n_grad);
}

}  // namespace implicit_steer::IST_ISA
