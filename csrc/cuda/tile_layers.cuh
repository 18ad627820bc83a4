// The kernel MLP of every edge, of layers that tile_sums.cuh sums over edges: one thread has an edge, as in exact
// kernels (exact_chunks.cuh), and its record goes to global memory, edge by edge as they are sorted.
#pragma once

#include "exact_chunks.cuh"
#include "exact_table.cuh"

namespace implicit_steer::IST_ISA {

// What the kernels are compiled for: φ, c coefficients and W channels of every hidden layer.
template <typename F, int kCoefficients, int kWidth>
struct Tiled {
  using Number = float;
  using Function = F;
  template <typename N>
  using MlpOf = ExactMlp<N>;
  using Mlp = MlpOf<Number>;
  struct Slots {
    static constexpr int degrees = kCoefficients - 1;  // that couplings read
  };
  static constexpr int c = kCoefficients, even = c / 2, width = kWidth;
};

// The same with a table in place of the layers.
template <int kCoefficients, int kWidth>
struct TiledTable : Tiled<void, kCoefficients, kWidth> {
  template <typename N>
  using MlpOf = ExactTable<N>;
  using Mlp = MlpOf<float>;
};

// S with a derivative along the tangents of its inputs.
template <typename S>
struct WithTangents : S {
  using Number = Dual<float>;
  using Mlp = typename S::template MlpOf<Number>;
};

template <typename S>
struct TileMemory {
  static constexpr int record = S::Slots::degrees * S::width + 4, records = 32 * record;
  static constexpr int exponent_at = 0, warps_at = 4;
  static constexpr int warp = records + 32 + S::width * S::c;
  static IST_HOST_DEVICE constexpr int in_front_of_mlp(int warps, int of_warp) { return warps_at + warps * of_warp; }
  static_assert(record % 8 == 4);
};
template <typename F, int kCoefficients, int kWidth>
struct ExactMemory<Tiled<F, kCoefficients, kWidth>> : TileMemory<Tiled<F, kCoefficients, kWidth>> {};
template <int kCoefficients, int kWidth>
struct ExactMemory<TiledTable<kCoefficients, kWidth>> : TileMemory<TiledTable<kCoefficients, kWidth>> {};
template <typename S>
struct ExactMemory<WithTangents<S>> : TileMemory<S> {};

template <typename S>
struct TileLayers : ExactChunks<S> {
  using Base = ExactChunks<S>;
  using Base::lane, Base::records, Base::mlp, Base::first, Base::last;
  using typename Base::N, typename Base::Memory;
  N* const rows;

  __device__ __forceinline__ explicit TileLayers(const FieldCall& call)
      : Base(call, Memory::warp), rows(reinterpret_cast<N*>(call.records.at)) {
    if constexpr (S::Mlp::is_table) __syncthreads();  // layers have one behind their weights
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int from = first; from < last; from += Base::of_chunk) {  // loop: chunks
      const int n = last - from < Base::of_chunk ? last - from : Base::of_chunk;
      this->chunk(from, n, NothingKept{});
      if constexpr (!S::Mlp::is_table)
        if (this->p.has_norms) normalise();
      __syncwarp();
      N* const to = rows + int64_t{from} * Memory::record;
      for (int k = 4 * lane; k < n * Memory::record; k += 128) neighbours<4>(to + k) = neighbours<4>(records + k);
      __syncwarp();
    }
  }

  // The last batch norm of this lane's edge.
  __device__ __forceinline__ void normalise() const {
    N* const record = records + lane * Memory::record;
    const N factor = record[Memory::record - 1];
#pragma unroll
    for (int w = 0; w < S::width; w += 4) {
      const auto scale = neighbours<4>(mlp.scale + w), shift = neighbours<4>(mlp.shift + w);
#pragma unroll
      for (int l = 0; l < S::Slots::degrees; ++l) {
        auto& h = neighbours<4>(record + l * S::width + w);
        Neighbours<N, 4> four = h;
#pragma unroll
        for (int j = 0; j < 4; ++j) four.at[j] = four.at[j] * scale.at[j] + (l == 0 ? shift.at[j] * factor : N{});
        h = four;
      }
    }
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads, S::width > 8 ? 2 : kResident<typename S::Number>)
    tile_layers(const __grid_constant__ FieldCall call) {
  TileLayers<S> warp(call);
  if (warp.number < call.shape.warps) warp.run();
}

}  // namespace implicit_steer::IST_ISA
