// Forward of a layer of scalars and vectors with exact sampling, in one kernel: out_i = Σ_path θ_path T_i[path].
//
// Edges are sorted by target. A warp owns a range of them and walks it 32 at a time, a chunk. First every lane has one
// edge of the chunk and evaluates the MLP for it (exact_mlp.cuh): what the sum over edges needs of it, its record, goes
// to the warp's shared memory. Then the lanes together sum the slots (exact_slots.cuh) over the edges of one node after
// another, 8 at a time, a step, by the tensor cores (mma.cuh):
//
//   T[slot, v, w] += Σ_edges slot[v] c_l[w],   A[(slot, v), edge] = slot[v],   B[edge, w] = c_l[w]
//
// Lane 4 g + t computes the slots of input field v = g for edges 2 t and 2 t + 1 of the step, in the place where A's
// fragment has them. A tile is two rows of A of 8 fields each, of slots of one degree; its T stays in four registers of
// every lane until the node ends. Then the lanes multiply it by θ.
//
// A node whose edges several warps share gets a row of outputs from each of them, as in forward.cuh.
#pragma once

#include "exact_mlp.cuh"
#include "mma.cuh"

namespace implicit_steer::IST_ISA {

struct ExactCall : Call<float> {
  ExactView exact;
};

// Rows of 8 fields of one degree's slots, two to a tile; the last one may stand alone.
template <typename S>
struct ExactTiles {
  using Slots = typename S::Slots;
  static constexpr int blocks = S::fields / 8;  // of 8 fields
  static IST_HOST_DEVICE constexpr int rows(int l) { return (Slots::first(l + 1) - Slots::first(l)) * blocks; }
  static IST_HOST_DEVICE constexpr int tiles(int l) { return (rows(l) + 1) / 2; }
  static IST_HOST_DEVICE constexpr int first(int l) { return l == 0 ? 0 : l == 1 ? tiles(0) : tiles(0) + tiles(1); }
  static constexpr int count = (Slots::first(1) * blocks + 1) / 2 +
                               ((Slots::first(2) - Slots::first(1)) * blocks + 1) / 2 +
                               ((Slots::count - Slots::first(2)) * blocks + 1) / 2;
  static IST_HOST_DEVICE constexpr int degree(int slot) {
    return slot < Slots::first(1) ? 0 : slot < Slots::first(2) ? 1 : 2;
  }
  // Where T of a slot and a block of fields is: its tile, and which of the tile's rows.
  static IST_HOST_DEVICE constexpr int row(int slot, int block) {
    return (slot - Slots::first(degree(slot))) * blocks + block;
  }
  static IST_HOST_DEVICE constexpr int tile(int slot, int block) { return first(degree(slot)) + row(slot, block) / 2; }
};

// A block's shared memory: θ, then its warps' pieces, at places that the compiler knows; then the MLP. Sizes in floats.
template <typename S>
struct ExactMemory {
  static constexpr int record =
      S::Slots::degrees * S::width + 4;  // c [l][w], direction, factor: an odd number of quads
  static constexpr int theta = S::Slots::paths * S::fields * S::fields * S::width, constant = 2 * S::fields * S::fields;
  static constexpr int aside = 32 * 4 * (ExactTiles<S>::count + ExactTiles<S>::blocks);
  // Records, sources, one edge near the origin, T of a node that goes on in the next chunk.
  static constexpr int warp = 32 * record + 32 + S::width * S::c + aside;
  static constexpr int in_front_of_mlp = theta + constant + kThreads / 32 * warp;
  static_assert(record % 8 == 4);
};

template <typename S>
struct ExactForward {
  using Slots = typename S::Slots;
  using Tiles = ExactTiles<S>;
  using Memory = ExactMemory<S>;
  const ConvArgs<float>& a;
  const PlanView<float>& p;
  const ExactView& exact;
  float* const partial;
  const int lane, group, pair;  // group g and t of mma.cuh
  const int64_t number, first, last;
  ExactMlp mlp;
  float *theta, *constant;  // [paths, u, v, w], [2, u, v]
  float *records, *near, *aside;
  int32_t* sources;
  float exponent;                                          // of the shell, for 2^x
  int scalar_at[Tiles::blocks], vector_at[Tiles::blocks];  // numbers of the inputs of this lane's fields
  float sums[Tiles::count][4];                             // T
  float constant_sums[Tiles::blocks][4];  // of the constant hidden feature, over this lane's edges: (scalar, x, y, z)

  __device__ __forceinline__ explicit ExactForward(const ExactCall& call)
      : a(call.args),
        p(call.plan),
        exact(call.exact),
        partial(call.partial),
        lane(threadIdx.x % 32),
        group(lane / 4),
        pair(lane % 4),
        number((int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32),
        first(number * call.shape.edges_per_warp),
        last(first + call.shape.edges_per_warp < a.n_edges ? first + call.shape.edges_per_warp : a.n_edges) {
    SHARED_MEMORY(float, memory);
    theta = memory, constant = theta + Memory::theta;
    records = constant + Memory::constant + threadIdx.x / 32 * Memory::warp;
    sources = reinterpret_cast<int32_t*>(records + 32 * Memory::record);
    near = records + 32 * Memory::record + 32, aside = near + S::width * S::c + 4 * lane;
    mlp.place<S>(memory + Memory::in_front_of_mlp, p);
    mlp.copy<S>(p, exact, a.weights);
    copy_theta();
    const float shell = a.weights[p.shell];
    exponent = -0.5f * kLog2e / (shell * shell);
#pragma unroll
    for (int block = 0; block < Tiles::blocks; ++block) {
      scalar_at[block] = global_memory(exact.scalar)[8 * block + group];
      vector_at[block] = global_memory(exact.vector)[8 * block + group];
    }
  }

  // θ at the scale of the last batch norm; its shift is a constant hidden feature.
  __device__ __forceinline__ void copy_theta() {
    const ExactWeight* const at = global_memory(exact.theta);
    for (int k = threadIdx.x; k < Memory::theta; k += blockDim.x) {
      const ExactWeight weight = at[k / S::width];
      theta[k] = weight.at < 0 ? 0 : weight.ratio * a.weights[weight.at + k % S::width] * mlp.scale[k % S::width];
    }
    for (int k = threadIdx.x; k < Memory::constant; k += blockDim.x) {
      const ExactWeight weight = global_memory(exact.constant)[k], shifted = at[k];
      static_assert(kScalarScalar == 0 && kVectorVector == 1);
      float sum = weight.at < 0 ? 0 : weight.ratio * a.weights[weight.at];
      for (int w = 0; w < S::width && shifted.at >= 0; ++w)
        sum += shifted.ratio * a.weights[shifted.at + w] * mlp.shift[w];
      constant[k] = sum;
    }
    __syncthreads();
  }

  __device__ __forceinline__ int64_t index(const void* numbers, int64_t n) const {
    return a.index64 ? static_cast<const int64_t*>(numbers)[n] : static_cast<const int32_t*>(numbers)[n];
  }

  // ---- the chunk: a lane has an edge

  struct Geometry {
    float x[3], squared, radius, inverse;
  };
  __device__ __forceinline__ Geometry geometry(int64_t edge) const {
    Geometry g;
#pragma unroll
    for (int k = 0; k < 3; ++k) g.x[k] = a.delta[3 * edge + k];
    g.squared = g.x[0] * g.x[0] + g.x[1] * g.x[1] + g.x[2] * g.x[2];
    const float softened = g.squared + Limits<float>::softening;
    g.inverse = inverse_root_approximate(softened), g.radius = softened * g.inverse;
    return g;
  }

  // Records of the n edges at positions begin ..; lanes without an edge take the last one.
  __device__ __forceinline__ void chunk(int64_t begin, int n) {
    const int64_t edge = index(a.order, begin + (lane < n ? lane : n - 1));
    const Geometry g = geometry(edge);
    const uint32_t near_edges = __ballot_sync(kWarp, lane < n && g.radius < Limits<float>::near);
    float* const record = records + lane * Memory::record;
    neighbours<4>(record + Slots::degrees * S::width) = {g.x[0] * g.inverse, g.x[1] * g.inverse, g.x[2] * g.inverse,
                                                         radial(g.squared)};
    sources[lane] = static_cast<int32_t>(index(a.src, edge));
    float c[S::width][S::c];
    mlp.evaluate<S>(g.radius, [&](int j) { return a.attr[edge * p.n_attr + j]; }, c);
    const float factor = record[Slots::degrees * S::width + 3];
#pragma unroll
    for (int l = 0; l < Slots::degrees; ++l)
#pragma unroll
      for (int w = 0; w < S::width; w += 4) {
        Neighbours<float, 4> four;
#pragma unroll
        for (int j = 0; j < 4; ++j) four.at[j] = c[w + j][place_of_degree(l)] * factor;
        neighbours<4>(record + l * S::width + w) = four;
      }
    __syncwarp();
    for (uint32_t left = near_edges; left != 0; left &= left - 1) near_edge(begin, __ffs(left) - 1);
  }

  // Overwrites the coefficients of the edge at position begin + at.
  __device__ __forceinline__ void near_edge(int64_t begin, int at) {
    const int64_t edge = index(a.order, begin + at);
    float* const record = records + at * Memory::record;
    const float factor = record[Slots::degrees * S::width + 3];
    mlp.evaluate_near<S>(
        geometry(edge).radius, [&](int j) { return a.attr[edge * p.n_attr + j]; }, near,
        [&](int l, int w, float value) { record[l * S::width + w] = value * factor; });
    __syncwarp();
  }

  __device__ __forceinline__ float radial(float squared) const {
    float factor = p.gamma * exp2_approximate(squared * exponent);
    if (p.has_cutoff) {
      float norm, inverse;
      safe_norm<float>(squared, norm, inverse);
      const float t = lane_min(1.0f, norm * (1 / p.cutoff));
      factor *= 1 - t * t * t * (10 - t * (15 - 6 * t));
    }
    return factor;
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

  // T to this lane's place in shared memory and back, so that the MLP of the next chunk has the registers.
  __device__ __forceinline__ void put_aside() const {
#pragma unroll
    for (int m = 0; m < Tiles::count; ++m)
      neighbours<4>(aside + 128 * m) = {sums[m][0], sums[m][1], sums[m][2], sums[m][3]};
#pragma unroll
    for (int m = 0; m < Tiles::blocks; ++m)
      neighbours<4>(aside + 128 * (Tiles::count + m)) = {constant_sums[m][0], constant_sums[m][1], constant_sums[m][2],
                                                         constant_sums[m][3]};
  }
  __device__ __forceinline__ void take_back() {
#pragma unroll
    for (int m = 0; m < Tiles::count + Tiles::blocks; ++m) {
      const auto four = neighbours<4>(aside + 128 * m);
#pragma unroll
      for (int i = 0; i < 4; ++i) (m < Tiles::count ? sums[m] : constant_sums[m - Tiles::count])[i] = four.at[i];
    }
  }

  // An edge of the chunk as a lane of a step has it; all zero where there is none.
  struct Edge {
    const float* record;
    const float* x;
    bool there;
    float u[3], factor;
  };
  __device__ __forceinline__ Edge edge_at(int at, int any, int stop) const {
    Edge e;
    e.there = at < stop;
    const int place = e.there ? at : any;
    e.record = records + place * Memory::record;
    e.x = a.x + int64_t{sources[place]} * p.in_size;
    const auto four = neighbours<4>(e.record + Slots::degrees * S::width);
    e.u[0] = four.at[0], e.u[1] = four.at[1], e.u[2] = four.at[2], e.factor = e.there ? four.at[3] : 0;
    return e;
  }

  __device__ __forceinline__ void field(const Edge& e, int block, float (&f)[4]) const {
    const float* const scalar = e.x + scalar_at[block];
    if (exact.quads) {
      const auto four = neighbours<4>(scalar);
#pragma unroll
      for (int k = 0; k < 4; ++k) f[k] = four.at[k];
    } else {
      f[0] = *scalar;
#pragma unroll
      for (int k = 0; k < 3; ++k) f[1 + k] = e.x[vector_at[block] + k];
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
        field(edges[e], block, f);
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
    Split<2> c;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float value = edges[e].record[l * S::width + group];
      c.set(e, edges[e].there ? value : 0);
    }
#pragma unroll
    for (int row = 0; row < rows; row += 2) {
      Split<4> tile;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + i % 2, slot = Slots::first(l) + r / Tiles::blocks;
        tile.set(i, r < rows ? slots[i / 2][r % Tiles::blocks][slot] : 0);
      }
      mma_3xtf32(sums[Tiles::first(l) + row / 2], tile, c);
    }
  }

  // ---- the node's outputs

  // Σ θ T, and all lanes' shares of it: 8 fields of 4 outputs at a time. Lane 4 u + k ends with output k of field u.
  __device__ __forceinline__ void finish(float* out) {
#pragma unroll 1
    for (int first_field = 0; first_field < S::fields; first_field += 8) {
      float shares[16];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        float lower[4], upper[4];
        mix(first_field + u, lower), mix(first_field + 4 + u, upper);
#pragma unroll
        for (int k = 0; k < 4; ++k) shares[4 * u + k] = exchange(lower[k], upper[k], 16);
      }
#pragma unroll
      for (int bit = 8; bit >= 1; bit /= 2)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (i < bit) shares[i] = exchange(shares[i], shares[i + bit], bit);
      const int to = global_memory(exact.out)[4 * first_field + lane];
      if (to >= 0) out[to] = shares[0];
    }
  }

  // Lanes without the bit get the sum of `lower` over a lane and its partner, lanes with it that of `upper`.
  __device__ __forceinline__ float exchange(float lower, float upper, int bit) const {
    const bool is_upper = lane & bit;
    return (is_upper ? upper : lower) + from_lane_xor(is_upper ? lower : upper, bit);
  }

  // This lane's share of the outputs (scalar, x, y, z) of field u.
  __device__ __forceinline__ void mix(int u, float* out) const {
    const float* const of_u = theta + (u * S::fields + group) * S::width + 2 * pair;
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
        const auto two = neighbours<2>(of_u + path * S::fields * S::fields * S::width + 8 * block * S::width);
#pragma unroll
        for (int slot = 0; slot < Slots::count; ++slot) {
          if (Slots::path(slot) != path) continue;
          const float* const t = &sums[Tiles::tile(slot, block)][Tiles::row(slot, block) % 2 * 2];
          out[Slots::component(slot)] += two.at[0] * t[0] + two.at[1] * t[1];
        }
      }
    }
  }

  // ---- the walk

  // The node into which the edge at position `at` goes.
  __device__ __forceinline__ int64_t target(int64_t at) const {
    int64_t low = 0, high = a.n_dst;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (index(a.rowptr, middle) <= at ? low : high) = middle;
    }
    return low;
  }

  __device__ __forceinline__ void walk() {
    int64_t node = target(first), end = index(a.rowptr, node + 1);
    bool leading = true;                               // the node is the warp's first one, and
    const bool begun = index(a.rowptr, node) < first;  // some of that one's edges are in an earlier warp
    bool goes_on = false;                              // the node has edges in an earlier chunk
#pragma unroll 1
    for (int64_t from = first; from < last; from += 32) {  // loop: chunks
      const int n = last - from < 32 ? static_cast<int>(last - from) : 32;
      chunk(from, n);
      clear();
      if (goes_on) take_back();
      for (int at = 0; at < n;) {  // loop: nodes
        const bool ends = end - from <= n;
        const int stop = ends ? static_cast<int>(end - from) : n;
#pragma unroll 1
        for (; at < stop; at += 8) step(at, stop);  // loop: T
        at = stop;
        goes_on = !ends && from + n < last;
        if (goes_on) {
          put_aside();
          break;
        }
        const bool shared = !ends || (leading && begun);
        finish(shared ? partial + (2 * number + !leading) * p.out_size : a.out + node * p.out_size);
        clear(), leading = false;
        while (from + at < last && end == from + at) end = index(a.rowptr, ++node + 1);
      }
      __syncwarp();
    }
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads, kResident<float>) exact_forward(const __grid_constant__ ExactCall call) {
  ExactForward<S> warp(call);
  if (warp.number < call.shape.warps) warp.walk();
}

}  // namespace implicit_steer::IST_ISA
