// A warp's range of edges, sorted by target, which it walks 32 at a time, a chunk. Every lane has one edge of a chunk
// and evaluates the MLP for it (exact_mlp.cuh): what is needed of the edge, its record, goes to the warp's shared
// memory.
#pragma once

#include "exact_mlp.cuh"
#include "field_call.h"

namespace implicit_steer::IST_ISA {

// A block's shared memory; sizes in numbers N: of a record, c [l][w], direction, factor.
template <typename S>
struct ExactMemory;

template <typename S>
struct ExactChunks {
  using N = typename S::Number;
  using Slots = typename S::Slots;
  using Memory = ExactMemory<S>;
  static constexpr int of_chunk = 32;  // edges
  const ConvArgs<float>& a;
  const PlanView<float>& p;
  const FieldView& view;
  const int lane, group, pair;    // group g and t of mma.cuh
  const int number, first, last;  // of the warp; positions of its edges
  typename S::Mlp mlp;
  N* records;
  int32_t* sources;
  N* exponent;  // of the shell, for 2^x

  // A warp has `size` numbers of shared memory, the first Memory::warp of them for what is here.
  __device__ __forceinline__ ExactChunks(const FieldCall& call, int size)
      : a(call.args),
        p(call.plan),
        view(call.view),
        lane(threadIdx.x % 32),
        group(lane / 4),
        pair(lane % 4),
        number(static_cast<int>(blockIdx.x * (blockDim.x / 32) + warp_of_block())),
        first(number < call.shape.warps ? number * static_cast<int>(call.shape.edges_per_warp) : 0),
        last(static_cast<int>(a.n_edges - first < call.shape.edges_per_warp ? a.n_edges
                                                                            : first + call.shape.edges_per_warp)) {
    SHARED_MEMORY(N, memory);
    exponent = memory + Memory::exponent_at;
    records = memory + Memory::warps_at + warp_of_block() * size;
    sources = reinterpret_cast<int32_t*>(records + Memory::records);
    mlp.template place<S>(memory + Memory::in_front_of_mlp(blockDim.x / 32, size), p);
    const N shell = weights()[p.shell_at];
    if (threadIdx.x == 0) *exponent = -0.5f * kLog2e / (shell * shell);
    mlp.template copy<S>(p, view, weights());
  }

  // Where registers are few in a form that the compiler knows to be the same in all lanes: it takes fewer of them, and
  // more instructions.
  static __device__ __forceinline__ unsigned warp_of_block() {
    const unsigned warp = threadIdx.x / 32;
    return kFewRegisters<S> ? from_lane(warp, 0) : warp;
  }
  // Of the warp's memory: [W, c], and what is behind Memory::warp.
  __device__ __forceinline__ N* near() const { return records + Memory::records + 32; }
  __device__ __forceinline__ N* rest() const { return records + Memory::warp; }
  // The packed weights: with tangents pairs of a weight and its tangent.
  __device__ __forceinline__ const N* weights() const { return reinterpret_cast<const N*>(a.weights); }
  // Number k of an array that may have tangents.
  static __device__ __forceinline__ N input(const float* values, const float* tangents, int64_t k) {
    if constexpr (is_dual<N>)
      return {values[k], tangents[k]};
    else
      return values[k];
  }
  __device__ __forceinline__ N attribute(int64_t edge, int j) const {
    return input(a.attr, a.attr_tangent, edge * p.n_attr + j);
  }

  // Of nodes and edges, whose numbers are less than 2^31.
  __device__ __forceinline__ int index(const void* numbers, int n) const {
    return a.index64 ? static_cast<int>(static_cast<const int64_t*>(numbers)[n])
                     : static_cast<const int32_t*>(numbers)[n];
  }

  // ---- the chunk: a lane has an edge

  struct Geometry {
    N x[3], squared, radius, inverse;
  };
  __device__ __forceinline__ Geometry geometry(int64_t edge) const {
    Geometry g;
#pragma unroll
    for (int k = 0; k < 3; ++k) g.x[k] = input(a.delta, a.delta_tangent, 3 * edge + k);
    g.squared = g.x[0] * g.x[0] + g.x[1] * g.x[1] + g.x[2] * g.x[2];
    const N softened = g.squared + Limits<float>::softening;
    g.inverse = inverse_root_approximate(softened), g.radius = softened * g.inverse;
    return g;
  }

  // Records of the n edges at positions begin ..; lanes without an edge take the last one. `keep`: of ExactMlp.
  template <typename Keep>
  __device__ __forceinline__ void chunk(int begin, int n, Keep keep) {
    const int64_t edge = index(a.order, begin + (lane < n ? lane : n - 1));
    const Geometry g = geometry(edge);
    uint32_t near_edges = 0;
    if constexpr (!S::Mlp::is_table) near_edges = __ballot_sync(kWarp, lane < n && g.radius < Limits<float>::near);
    N* const record = records + lane * Memory::record;
    neighbours<4>(record + Slots::degrees * S::width) = {g.x[0] * g.inverse, g.x[1] * g.inverse, g.x[2] * g.inverse,
                                                         radial(g.squared)};
    sources[lane] = index(a.src, static_cast<int>(edge));
    N c[S::width][S::c];
    mlp.template evaluate<S>(g.radius, [&](int j) { return attribute(edge, j); }, keep, c);
    const N factor = record[Slots::degrees * S::width + 3];
#pragma unroll
    for (int l = 0; l < Slots::degrees; ++l)
#pragma unroll
      for (int w = 0; w < S::width; w += 4) {
        Neighbours<N, 4> four;
#pragma unroll
        for (int j = 0; j < 4; ++j) four.at[j] = c[w + j][place_of_degree<S>(l)] * factor;
        neighbours<4>(record + l * S::width + w) = four;
      }
    __syncwarp();
    if constexpr (!S::Mlp::is_table)
      for (uint32_t left = near_edges; left != 0; left &= left - 1) near_edge(begin, __ffs(left) - 1, keep);
  }

  // Overwrites the coefficients of the edge at position begin + at.
  template <typename Keep>
  __device__ __forceinline__ void near_edge(int begin, int at, Keep keep) {
    const int64_t edge = index(a.order, begin + at);
    N* const record = records + at * Memory::record;
    const N factor = record[Slots::degrees * S::width + 3];
    mlp.template evaluate_near<S>(
        geometry(edge).radius, [&](int j) { return attribute(edge, j); }, near(),
        [&](int layer, LayerValue what, int k, int w, N value) { keep.put(at, layer, what, k, w, value); },
        [&](int l, int w, N value) { record[l * S::width + w] = value * factor; });
    __syncwarp();
  }

  // γ times the shell times the cutoff
  __device__ __forceinline__ N radial(N squared) const {
    const N shell = p.gamma * exp2_approximate(squared * *exponent);
    return p.has_cutoff ? shell * cutoff(squared).value : shell;
  }
  // At t = min(|x| / cutoff, 1): 1 - 10 t³ + 15 t⁴ - 6 t⁵, and its derivative by |x|²/2.
  struct Cutoff {
    N value, slope;
  };
  __device__ __forceinline__ Cutoff cutoff(N squared) const {
    N norm, inverse;
    safe_norm<N>(squared, norm, inverse);
    const float per_length = 1 / p.cutoff;
    const N t = lane_min(constant_number<N>(1), norm * per_length);
    return {1 - t * t * t * (10 - t * (15 - 6 * t)), -30 * t * t * (1 - t) * (1 - t) * per_length * inverse};
  }

  // ---- the walk

  // The node into which the edge at position `at` goes.
  __device__ __forceinline__ int target(int at) const {
    int low = 0, high = static_cast<int>(a.n_dst);
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      (index(a.rowptr, middle) <= at ? low : high) = middle;
    }
    return low;
  }
};

}  // namespace implicit_steer::IST_ISA
