// What the exact kernels (exact_forward.cuh, exact_backward.cuh) have in common: the sums over the edges of a node.
//
// First every lane makes the record of one edge of the chunk (exact_chunks.cuh). Then the lanes together sum the slots
// (exact_slots.cuh) over the edges of one node after another, 8 at a time, a step, by the tensor cores (mma.cuh):
//
//   T[slot, v, w] += Σ_edges slot[v] c_l[w],   A[(slot, v), edge] = slot[v],   B[edge, w] = c_l[w]
//
// Lane 4 g + t computes the slots of input field v = g for edges 2 t and 2 t + 1 of the step, in the place where A's
// fragment has them. A tile is two rows of A of 8 fields each, of slots of one degree, and 8 channels w; its T stays in
// four registers of every lane until the node ends.
#pragma once

#include "exact_chunks.cuh"
#include "mma.cuh"

namespace implicit_steer::IST_ISA {

// Rows of 8 fields of one degree's slots, two to a tile; the last one may stand alone. Then the same of 8 channels
// more.
template <typename S>
struct ExactTiles {
  using Slots = typename S::Slots;
  static constexpr int blocks = S::fields / 8, channels = S::width / 8;  // of 8 fields, of 8 channels
  static constexpr int passes = blocks * channels;                       // pairs of them
  static IST_HOST_DEVICE constexpr int rows(int l) { return (Slots::first(l + 1) - Slots::first(l)) * blocks; }
  static IST_HOST_DEVICE constexpr int tiles(int l) { return (rows(l) + 1) / 2; }
  static IST_HOST_DEVICE constexpr int first(int l) { return l == 0 ? 0 : l == 1 ? tiles(0) : tiles(0) + tiles(1); }
  static constexpr int of_channels = (Slots::first(1) * blocks + 1) / 2 +
                                     ((Slots::first(2) - Slots::first(1)) * blocks + 1) / 2 +
                                     ((Slots::count - Slots::first(2)) * blocks + 1) / 2;
  static constexpr int count = channels * of_channels;
  static IST_HOST_DEVICE constexpr int degree(int slot) {
    return slot < Slots::first(1) ? 0 : slot < Slots::first(2) ? 1 : 2;
  }
  // Where T of a slot, a block of fields and a block of channels is: its tile, and which of the tile's rows.
  static IST_HOST_DEVICE constexpr int row(int slot, int block) {
    return (slot - Slots::first(degree(slot))) * blocks + block;
  }
  static IST_HOST_DEVICE constexpr int tile(int slot, int block, int channel) {
    return channel * of_channels + first(degree(slot)) + row(slot, block) / 2;
  }
  static constexpr bool rows_are_channels = false;
  // Place of number k of θ [path, u, v, w] in the order in which tiles meet it, [path, u, w / 8, v, w % 8]; and where a
  // path's numbers of blocks of fields and channels begin, for u = 0.
  static IST_HOST_DEVICE constexpr int theta_at(int k) {
    constexpr int square = S::fields * S::width;
    return k - k % square + k % S::width / 8 * 8 * S::fields + k % square / S::width * 8 + k % 8;
  }
  static IST_HOST_DEVICE constexpr int theta_of(int path, int block, int channel) {
    return path * S::fields * S::fields * S::width + 8 * (channel * S::fields + 8 * block);
  }
};

// A block's shared memory: θ, then its warps' pieces, at places that the compiler knows; then the MLP. Sizes in floats.
template <typename S>
struct ExactMemory {
  static constexpr int record =
      S::Slots::degrees * S::width + 4;  // c [l][w], direction, factor: an odd number of quads
  static constexpr int theta = S::Slots::paths * S::fields * S::fields * S::width, constant = 2 * S::fields * S::fields;
  static constexpr int numbers = S::fields + 4;  // of the fields' scalars; the shell's exponent
  static constexpr int exponent_at = theta + constant + S::fields, warps_at = theta + constant + numbers;
  static constexpr int records = 32 * record;
  static constexpr int warp = records + 32 + S::width * S::c;  // records, sources, one edge near the origin; so far
  // What is put aside in shared memory of T of a node that goes on: the tiles from this one on. In kernels of many
  // channels all but one of the hidden features stay in registers.
  static constexpr int tiles = ExactTiles<S>::count + ExactTiles<S>::blocks;
  static constexpr int first_aside = S::width > 8 ? ExactTiles<S>::count - 1 : 0;
  static constexpr int aside = 32 * 4 * (tiles - first_aside);
  static IST_HOST_DEVICE constexpr int in_front_of_mlp(int warps, int of_warp) {
    return theta + constant + numbers + warps * of_warp;
  }
  static_assert(record % 8 == 4);
};

// Numbers of a node's T as ExactWarp::put_aside() writes it, of all lanes.
template <typename S>
constexpr int kNodeSum = 128 * (ExactTiles<S>::count + ExactTiles<S>::blocks);
// See FieldCall.
__device__ __forceinline__ int32_t& edges_of_node_sums(const ConvArgs<float>& a) {
  return *reinterpret_cast<int32_t*>(a.node_sums);
}
template <typename S>
__device__ __forceinline__ float* node_sums_of(const ConvArgs<float>& a, int node, int warp) {
  return a.node_sums + kInFrontOfNodeSums + (int64_t{node} + warp) * kNodeSum<S>;
}

template <typename S>
struct ExactWarp : ExactChunks<S> {
  using Base = ExactChunks<S>;
  using Base::a, Base::p, Base::view, Base::lane, Base::group, Base::pair, Base::mlp, Base::records, Base::sources;
  using typename Base::Slots, typename Base::Memory;
  using Tiles = ExactTiles<S>;
  float *theta, *constant;                // [paths, u, v, w], [2, u, v]
  int32_t* scalars;                       // [fields] numbers of the fields' scalars
  float sums[Tiles::count][4];            // T
  float constant_sums[Tiles::blocks][4];  // of the constant hidden feature, over this lane's edges: (scalar, x, y, z)

  __device__ __forceinline__ ExactWarp(const FieldCall& call, int size) : Base(call, size) {
    SHARED_MEMORY(float, memory);
    theta = memory, constant = theta + Memory::theta;
    scalars = reinterpret_cast<int32_t*>(constant + Memory::constant);
    if (threadIdx.x < S::fields) scalars[threadIdx.x] = global_memory(view.scalar)[threadIdx.x];
    copy_theta();
  }

  // θ at the scale of the last batch norm; its shift is a constant hidden feature.
  __device__ __forceinline__ void copy_theta() {
    const FieldWeight* const at = global_memory(view.theta);
#pragma unroll 1
    for (int k = threadIdx.x; k < Memory::theta / S::width; k += blockDim.x) {  // [path, u, v]
      const FieldWeight weight = at[k];
#pragma unroll
      for (int w = 0; w < S::width; w += 4) {
        Neighbours<float, 4> four{};
        if (weight.at >= 0) {
#pragma unroll
          for (int j = 0; j < 4; ++j) four.at[j] = weight.ratio * a.weights[weight.at + w + j] * mlp.scale[w + j];
        }
        float* const to = theta + Tiles::theta_at(k * S::width + w);
        if constexpr (Tiles::rows_are_channels) {
#pragma unroll
          for (int j = 0; j < 4; ++j) to[j * S::fields] = four.at[j];
        } else {
          neighbours<4>(to) = four;
        }
      }
    }
    for (int k = threadIdx.x; k < Memory::constant; k += blockDim.x) {
      const FieldWeight weight = global_memory(view.constant)[k], shifted = at[k];
      static_assert(kScalarScalar == 0 && kVectorVector == 1);
      float sum = weight.at < 0 ? 0 : weight.ratio * a.weights[weight.at];
      for (int w = 0; w < S::width && shifted.at >= 0; ++w)
        sum += shifted.ratio * a.weights[shifted.at + w] * mlp.shift[w];
      constant[k] = sum;
    }
    __syncthreads();
  }

  // ---- the sum over a node's edges

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < Tiles::count; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][i] = 0;
#pragma unroll
    for (int m = 0; m < Tiles::blocks; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) constant_sums[m][i] = 0;
  }

  // T's tiles from `kFrom` on to this lane's place in memory and back, so that the MLP of the next chunk has the
  // registers.
  template <int kFrom = 0>
  __device__ __forceinline__ void put_aside(float* aside) const {
#pragma unroll
    for (int m = kFrom; m < Tiles::count + Tiles::blocks; ++m) {
      const float* const four = m < Tiles::count ? sums[m] : constant_sums[m - Tiles::count];
      neighbours<4>(aside + 128 * (m - kFrom)) = {four[0], four[1], four[2], four[3]};
    }
  }
  template <int kFrom = 0>
  __device__ __forceinline__ void take_back(const float* aside) {
#pragma unroll
    for (int m = kFrom; m < Tiles::count + Tiles::blocks; ++m) {
      const auto four = neighbours<4>(aside + 128 * (m - kFrom));
#pragma unroll
      for (int i = 0; i < 4; ++i) (m < Tiles::count ? sums[m] : constant_sums[m - Tiles::count])[i] = four.at[i];
    }
  }

  // An edge of the chunk as a lane of a step has it; all zero where there is none.
  struct Edge {
    const float* record;
    int source;
    bool there;
    float u[3], factor;
  };
  __device__ __forceinline__ Edge edge_at(int at, int any, int stop) const {
    Edge e;
    e.there = at < stop;
    const int place = e.there ? at : any;
    e.record = records + place * Memory::record;
    e.source = sources[place];
    const auto four = neighbours<4>(e.record + Slots::degrees * S::width);
    e.u[0] = four.at[0], e.u[1] = four.at[1], e.u[2] = four.at[2], e.factor = e.there ? four.at[3] : 0;
    return e;
  }

  // Field v, (scalar, x, y, z), of a row of inputs, whose scalar is at that place.
  __device__ __forceinline__ void field(const float* scalar, int v, float (&f)[4]) const {
    if (view.quads) {
      const auto four = neighbours<4>(scalar);
#pragma unroll
      for (int k = 0; k < 4; ++k) f[k] = four.at[k];
    } else {
      const float* const vector = scalar + (global_memory(view.vector)[v] - scalars[v]);
      f[0] = *scalar;
#pragma unroll
      for (int k = 0; k < 3; ++k) f[1 + k] = vector[k];
    }
  }
  // T += the sum over edges at .. at + 7 of the chunk before `stop`, all into one node.
  __device__ __forceinline__ void step(int at, int stop) {
    const Edge edges[2] = {edge_at(at + 2 * pair, at, stop), edge_at(at + 2 * pair + 1, at, stop)};
    float slots[2][Tiles::blocks][Slots::count];
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int block = 0; block < Tiles::blocks; ++block) {
        float f[4];
        const int v = 8 * block + group;
        const float* const inputs = S::large ? opaque(a.x) : a.x;  // for want of registers not kept with its offset
        field(row_of(inputs + scalars[v], edges[e].source, p.in_size), v, f);
        Slots::evaluate(f, edges[e].u, slots[e][block]);
#pragma unroll
        for (int k = 0; k < 4; ++k) constant_sums[block][k] += edges[e].factor * f[k];
      }
    add_degree<0>(edges, slots), add_degree<1>(edges, slots), add_degree<2>(edges, slots);
  }

  template <int l>
  __device__ __forceinline__ void add_degree(const Edge (&edges)[2],
                                             const float (&slots)[2][Tiles::blocks][Slots::count]) {
    constexpr int rows = Tiles::rows(l);
    Split<2> c[Tiles::channels];
#pragma unroll
    for (int channel = 0; channel < Tiles::channels; ++channel)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float value = edges[e].record[l * S::width + 8 * channel + group];
        c[channel].set(e, edges[e].there ? value : 0);
      }
#pragma unroll
    for (int row = 0; row < rows; row += 2) {
      Split<4> tile;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + i % 2, slot = Slots::first(l) + r / Tiles::blocks;
        tile.place(i, r < rows ? slots[i / 2][r % Tiles::blocks][slot] : 0);
      }
#pragma unroll
      for (int channel = 0; channel < Tiles::channels; ++channel)
        mma_3xtf32(sums[channel * Tiles::of_channels + Tiles::first(l) + row / 2], tile, c[channel]);
    }
  }
};

// T += the sum over edges at .. of the chunk before `stop`, all into one node, by a warp's step().
template <typename Warp>
__device__ __forceinline__ void add_edges(Warp& warp, int at, int stop) {
#pragma unroll 1
  for (; at < stop; at += 8) warp.step(at, stop);  // loop: T
}

}  // namespace implicit_steer::IST_ISA
