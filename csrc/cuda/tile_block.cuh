// What the blocks of tile_sums.cuh and tile_backward.cuh have in common: some nodes, whose edges lie side by side, so
// many of them at a time, a chunk; and the direction's part of the products, in the block's shared memory: of every
// edge of the chunk monomials, harmonics Y, and G = Σ value · Y of all paths. Threads have one edge each and share the
// rows.
#pragma once

#include "neighbours.cuh"
#include "tile_call.h"

namespace implicit_steer::IST_ISA {

// Edges begin .. stop - 1 of a chunk, which go into one node of the block; whether others of its are in an earlier
// chunk.
struct TileRun {
  int begin, stop, node;
  bool goes_on;
};

template <typename N, int kEdges>
struct TileBlock {
  static constexpr int shares = kTileThreads / kEdges;
  static constexpr int numbers = TileCall<N>::kMostNodes + 4 + kEdges;  // of shared memory, beside the rows
  const TileCall<N>& call;
  const WideCall<N>& wide;
  const int lane, group, pair, warp;  // group g and t of mma.cuh
  const int edge, share;              // of this thread
  const int64_t first_node;           // of the launch's block of nodes
  const int nodes;
  const int64_t start;           // position of the block's first edge
  const N* const rows_of_block;  // records of its edges
  int32_t* const bounds;         // [nodes + 1] where each node's edges begin, from `start` on
  int32_t* const sources;        // [kEdges] of the chunk
  N* const rows;                 // [of_edge, kEdges]
  int node = 0;                  // into which the chunk's first edge goes

  __device__ __forceinline__ TileBlock(const TileCall<N>& call, N* memory)
      : call(call),
        wide(call.wide),
        lane(threadIdx.x % 32),
        group(lane / 4),
        pair(lane % 4),
        warp(threadIdx.x / 32),
        edge(threadIdx.x % kEdges),
        share(threadIdx.x / kEdges),
        first_node(int64_t{blockIdx.x} * call.nodes_per_block),
        nodes(static_cast<int>(wide.n_nodes - first_node < call.nodes_per_block ? wide.n_nodes - first_node
                                                                                : call.nodes_per_block)),
        start(wide.first_edge(first_node)),
        rows_of_block(call.rows + start * call.tiles.record),
        bounds(reinterpret_cast<int32_t*>(memory)),
        sources(bounds + TileCall<N>::kMostNodes + 4),
        rows(memory + numbers) {
    if (static_cast<int>(threadIdx.x) <= nodes)
      bounds[threadIdx.x] = static_cast<int32_t>(wide.first_edge(first_node + threadIdx.x) - start);
    for (int k = 4 * threadIdx.x; k < call.tiles.of_edge() * kEdges; k += 4 * kTileThreads)
      neighbours<4>(rows + k) = {};
    __syncthreads();
  }

  __device__ __forceinline__ int n_edges() const { return bounds[nodes]; }
  __device__ __forceinline__ N* g() const { return rows + (call.tiles.n_monomials + call.tiles.n_harmonics) * kEdges; }
  // From a node's T of one component o of the path to that of the next.
  __device__ __forceinline__ int64_t step(const TilePath& path) const { return path.size * wide.n_nodes; }
  __device__ __forceinline__ const N* record(int at) const { return rows_of_block + at * call.tiles.record; }

  // Of the n edges from `from` on those behind the first `begin` that go into the next node, which is the node `at` or
  // a later one; begins at n behind the last one.
  __device__ __forceinline__ TileRun next_run(int from, int n, int begin, int at) const {
    if (begin >= n) return {n, n, at, false};
    while (bounds[at + 1] <= from + begin) ++at;
    const int end = bounds[at + 1] - from;
    return {begin, end < n ? end : n, at, bounds[at] < from};
  }

  // Direction and factor of this thread's one of n edges; beyond the last one those of the last.
  __device__ __forceinline__ Neighbours<N, 4> direction(int from, int n) const {
    return neighbours<4>(record(from + (edge < n ? edge : n - 1) + 1) - 4);
  }

  // Sources, numbers unless that is null, and rows of n edges from `from` on. By all threads, with barriers.
  __device__ __forceinline__ void enter(int from, int n, const Neighbours<N, 4>& u, int32_t* numbers_of_edges) {
    if (share == 0) {
      const int64_t number = wide.args.index(wide.args.order, start + from + (edge < n ? edge : n - 1));
      sources[edge] = static_cast<int32_t>(wide.args.index(wide.args.src, number));
      if (numbers_of_edges) numbers_of_edges[edge] = static_cast<int32_t>(number);
      monomials(u);
    }
    while (bounds[node + 1] <= from) ++node;
    __syncthreads();
    multiply(call.tiles.harmonics, rows);
    __syncthreads();
    multiply(call.tiles.g, rows);
    __syncthreads();
  }

  static __device__ __forceinline__ N along(const Neighbours<N, 4>& u, int axis) {
    return axis == 0 ? u.at[0] : axis == 1 ? u.at[1] : u.at[2];
  }
  __device__ __forceinline__ void monomials(const Neighbours<N, 4>& u) const {
    N* const mine = rows + edge;
    const int32_t* const list = global_memory(call.tiles.monomials);
    mine[0] = constant_number<N>(1);
    for (int k = 1; k < call.tiles.n_monomials; ++k) {
      const auto factors = neighbours<2>(list + 2 * k);
      mine[k * kEdges] = mine[factors.at[0] * kEdges] * along(u, factors.at[1]);
    }
  }

  // Rows of the matrix's product from others of `of`: a thread has four edges of some of them.
  __device__ __forceinline__ void multiply(const TileMatrix& matrix, N* of) const {
    constexpr int quads = kEdges / 4, parts = TileMatrix::kParts * quads / kTileThreads;  // of a thread
    const int number = static_cast<int>(threadIdx.x) / quads * parts;
    N* const mine = of + threadIdx.x % quads * 4;
    const TileTerm* const terms = global_memory(matrix.terms);
    const int32_t* const first = global_memory(matrix.first);
    const int end = first[number + parts];
    Neighbours<N, 4> sum{};
#pragma unroll 1
    for (int k = first[number]; k < end; ++k) {  // loop: direction
      const TileTerm term = terms[k];
      add_multiple(sum, term.value, neighbours<4>(mine + term.from * kEdges));
      if (term.is_last) neighbours<4>(mine + term.to * kEdges) = sum, sum = {};
    }
  }

  // The gradient of the direction from that of G, in rows like `rows`; of the threads with share 0. By all threads,
  // with barriers.
  __device__ __forceinline__ Neighbours<N, 4> backward(const Neighbours<N, 4>& u, N* d_rows) const {
    multiply(call.tiles.of_harmonics, d_rows);
    __syncthreads();
    multiply(call.tiles.of_monomials, d_rows);
    __syncthreads();
    Neighbours<N, 4> d_u{};
    if (share != 0) return d_u;
    const int32_t* const list = global_memory(call.tiles.monomials);
    for (int k = call.tiles.n_monomials - 1; k > 0; --k) {
      const auto factors = neighbours<2>(list + 2 * k);
      const int earlier = factors.at[0] * kEdges + edge;
      const N d_k = d_rows[k * kEdges + edge];
      d_rows[earlier] += d_k * along(u, factors.at[1]);
#pragma unroll
      for (int m = 0; m < 3; ++m) d_u.at[m] += factors.at[1] == m ? d_k * rows[earlier] : N{};
    }
    return d_u;
  }
};

}  // namespace implicit_steer::IST_ISA
