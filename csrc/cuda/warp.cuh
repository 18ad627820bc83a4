// One warp's edges: their memory, and what all kernels do with a tile of them.
//
// A warp walks a contiguous range of edges in target order, a tile at a time. `lanes` neighbouring lanes share an edge:
// they divide the rows of linear layers, the channels of activations and the fields of products among them, and one of
// them, `sub` 0, computes the frame. So the memory of an edge is used by several lanes, and the tile's memory is small
// enough for many warps. Every edge has a slice of shared memory, an odd number of quads: lanes that read the same
// place of eight different slices meet in no bank.
#pragma once

#include "../edge_mlp.h"
#include "../spline_pieces.h"
#include "edge_arrays.cuh"
#include "lanes_of_warp.cuh"
#include "neighbours.cuh"

namespace implicit_steer::IST_ISA {

// φ of the plan, chosen at run time where it is evaluated: everything around it is compiled once. Its number stands in
// the first word of the block's shared memory.
struct ChosenFunction {
  static constexpr bool is_elu = false;
  static __device__ __forceinline__ int& number() {
    SHARED_MEMORY(int, word);
    return word[0];
  }
  static __device__ __forceinline__ bool kinked() { return number() == kElu || number() == kRelu; }
  template <typename V>
  static __device__ __forceinline__ V value(V x) {
    V y{};
    with_function<V>(number(), [&](auto f) { y = decltype(f)::value(x); });
    return y;
  }
  template <typename V>
  static __device__ __forceinline__ V prime(V x) {
    V slope{};
    with_function<V>(number(), [&](auto f) { slope = decltype(f)::prime(x); });
    return slope;
  }
  template <typename V>
  static __device__ __forceinline__ V second(V x) {
    V curvature{};
    with_function<V>(number(), [&](auto f) { curvature = decltype(f)::second(x); });
    return curvature;
  }
  template <typename V>
  static __device__ __forceinline__ V both(V x, V& slope) {
    V y{};
    with_function<V>(number(), [&](auto f) { y = decltype(f)::both(x, slope); });
    return y;
  }
};
constexpr int kBlockBytes = 16;  // of shared memory in front of the layers' and the warps'

// kFeatures: the edges have neighbours, else they are points in their given order.
template <typename N, bool kFeatures, bool kBackward>
struct Warp : EdgeArrays<N> {
  using R = Real<N>;
  using Base = EdgeArrays<N>;
  using Function = ChosenFunction;
  using Base::e, Base::z, Base::y, Base::normed, Base::hidden, Base::f, Base::g, Base::t;
  const ConvArgs<R>& a;
  const PlanView<R>& p;
  const CouplingLists& terms;
  const N* weights;  // packed
  N shell;
  N* rest;  // of the warp's memory, behind the edges
  const int lane, lanes, sub, slot, tile, edge_size, table_row;
  const int64_t number;       // of the warp
  const int64_t first, last;  // positions of its edges
  int n_edges = 0;            // of the tile
  bool active = false;        // the tile has an edge for this lane
  int64_t edge = 0, node = 0;

  __device__ __forceinline__ explicit Warp(const Call<R>& call)
      : a(call.args),
        p(call.plan),
        terms(call.terms),
        weights(reinterpret_cast<const N*>(call.args.weights)),
        lane(threadIdx.x % 32),
        lanes(call.shape.lanes),
        sub(lane & (lanes - 1)),
        slot(lane / lanes),
        tile(32 / lanes),
        edge_size(call.shape.edge_size),
        table_row(static_cast<int>(call.extent.table_row)),
        number((int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32),
        first(number * call.shape.edges_per_warp),
        last(first + call.shape.edges_per_warp < a.n_edges ? first + call.shape.edges_per_warp : a.n_edges) {
    SHARED_MEMORY(unsigned char, memory);
    N* const numbers = reinterpret_cast<N*>(memory + kBlockBytes);
    if (threadIdx.x == 0) ChosenFunction::number() = p.function;
    __syncthreads();
    N* const edges = numbers + threadIdx.x / 32 * call.shape.warp_size;
    Slice<N> slice{edges + slot * edge_size};
    this->place(slice, p, call.extent, Needs{kFeatures, kBackward});
    rest = edges + whole_quads(tile * edge_size);
    shell = weights[p.shell_at];
    e.d_shell = N{};
  }

  __device__ __forceinline__ int64_t index(const void* numbers, int64_t n) const {
    return a.index64 ? static_cast<const int64_t*>(numbers)[n] : static_cast<const int32_t*>(numbers)[n];
  }
  // Number n of an array that may have tangents.
  __device__ __forceinline__ N input(const R* values, const R* tangents, int64_t n) const {
    if constexpr (is_dual<N>)
      return {values[n], tangents[n]};
    else
      return values[n];
  }
  // The array of the tile's edge l that is `mine` of this lane's edge.
  __device__ __forceinline__ const N* of_edge(const N* mine, int l) const { return mine + (l - slot) * edge_size; }
  __device__ __forceinline__ N* of_edge(N* mine, int l) const { return mine + (l - slot) * edge_size; }

  __device__ __forceinline__ LayerView<R> layer_view(int n) const {
    LayerView<R> layer = p.layers[n];
    layer.groups = global_memory(layer.groups);
    layer.samples = global_memory(layer.samples), layer.inverse_t = global_memory(layer.inverse_t);
    layer.pair_samples = global_memory(layer.pair_samples), layer.pair_inverse = global_memory(layer.pair_inverse);
    return layer;
  }
  __device__ __forceinline__ CouplingView coupling_view(int n) const {
    CouplingView coupling = p.couplings[n];
    coupling.slots = global_memory(coupling.slots), coupling.groups = global_memory(coupling.groups);
    coupling.blocks = global_memory(coupling.blocks);
    return coupling;
  }

  // ---- one tile

  // Edges at positions begin ..: in target order, or points in their given order.
  __device__ __forceinline__ void load(int64_t begin, int64_t end) {
    n_edges = end - begin < tile ? static_cast<int>(end - begin) : tile;
    active = slot < n_edges;
    if (!active) return;
    edge = kFeatures ? index(a.order, begin + slot) : begin + slot;
    if (sub == 0) {
      for (int k = 0; k < p.dim; ++k) e.delta[k] = input(a.delta, a.delta_tangent, edge * p.dim + k);
      for (int k = 0; k < p.n_attr; ++k) e.attr[k] = input(a.attr, a.attr_tangent, edge * p.n_attr + k);
    }
    if (!kFeatures) return;
    const int64_t source = index(a.src, edge) * p.in_size;
    for (int k = sub; k < p.n_gathered; k += lanes)
      f[k] = p.gathered_from[k] < 0 ? N{} : input(a.x, a.x_tangent, source + p.gathered_from[k]);
    node = target(begin + slot);
  }

  // The node into which the edge at this position goes; from the last one on.
  __device__ __forceinline__ int64_t target(int64_t at) const {
    return last_start(node, a.n_dst, at, [&](int64_t i) { return index(a.rowptr, i); });
  }

  __device__ __forceinline__ void enter_frame(bool all_harmonics) {
    e.near_origin = false, e.radius = e.factor = N{};
    if (active && sub == 0) {
      for (int m = 0; m < p.d; ++m) e.first[m] = N{};  // harmonics that no coupling reads stay 0
#pragma unroll 1
      for (int n = 0; n < 2; ++n) {
        frame_forward(p, shell, e, all_harmonics);
        if (!p.regular || e.near_origin || !(e.radius < Limits<R>::near)) break;
        e.near_origin = true;  // once more, as such an edge wants it
      }
    }
    const int leader = lane - sub;
    e.near_origin = from_lane(static_cast<int>(e.near_origin), leader);
    e.radius = from_lane(e.radius, leader), e.factor = from_lane(e.factor, leader);
    __syncwarp();
  }

  // G times the radial factor
  __device__ __forceinline__ void factors(N* out) const {
    for (int k = sub; k < p.n_g; k += lanes) {
      N sum{};
      for (int n = p.g_first[k]; n < p.g_first[k + 1]; ++n) sum += harmonic(n) * p.nz_value[n];
      out[k] = sum * e.factor;
    }
  }
  // The harmonic of nonzero n of the couplings, or 1
  __device__ __forceinline__ N harmonic(int n) const {
    return p.nz_harmonic[n] < 0 ? N{} + 1 : e.first[p.nz_harmonic[n]];
  }

  // t[v] = Σ f[i, v] G_i. Two lanes share a product.
  __device__ __forceinline__ void products() {
    for (int n = sub / 2; n < p.n_products; n += lanes / 2) {
      const int32_t* product = p.products + 4 * n;
      const int at = product[0], size = product[1], begin = product[2], end = product[3];
      for (int v = sub % 2 * kTogether<N>; v < size; v += 2 * kTogether<N>) {
        Neighbours<N, kTogether<N>> sum{};
#pragma unroll 1
        for (int i = begin; i < end; ++i) add_multiple(sum, g[i], neighbours<kTogether<N>>(f + p.g_from[i] + v));
        neighbours<kTogether<N>>(t + at + v) = sum;
      }
    }
  }

  // ---- the MLP

  __device__ __forceinline__ void linear(const LayerView<R>& layer, const N* in, N* out) {
    const N *w = weights + layer.weight, *bias = weights + layer.bias;
    const int32_t* group = layer.groups;
    for (int n = 0; n < layer.n_groups; ++n) {
      const int n_rows = group[0], n_columns = group[1];
      const int32_t *rows = group + 2, *columns = rows + n_rows;
      for (int r = sub; r < n_rows; r += lanes)
        linear_rows<1>(w + r * n_columns, bias, n_columns, columns, rows + r, in, out);
      w += n_rows * n_columns;
      group = columns + n_columns;
    }
  }

  __device__ __forceinline__ void channel(const LayerView<R>& layer, const N* z_w, N* y_w) const {
    channel_forward<Function>(p, layer, e, z_w, y_w, static_cast<N*>(nullptr));
  }

  __device__ __forceinline__ void activations(const LayerView<R>& layer, bool norm, const N* z_n, N* y_n, N* normed_n) {
    const int channels = layer.out_size / p.c;
    const N *scale = weights + layer.affine, *shift = scale + channels;
    for (int w = sub; w < channels; w += lanes) {
      channel(layer, z_n + w * p.c, y_n + w * p.c);
      if (norm) norm_channel<N>(p, scale[w], shift + w * p.n_trivial, y_n + w * p.c, normed_n + w * p.c);
    }
  }

  // Layers 0 .. last; the last one's activations before its batch norm if not `norm_last`.
  __device__ __forceinline__ const N* layers(int last_layer, bool norm_last) {
    const N* in = e.inputs;
    N *z_n = z, *y_n = y, *normed_n = normed;
    for (int n = 0; n <= last_layer; ++n) {  // loop: layers
      const LayerView<R> layer = layer_view(n);
      if (active) linear(layer, in, z_n);
      __syncwarp();
      const bool norm = p.has_norms && (n < last_layer || norm_last);
      if (active) activations(layer, norm, z_n, y_n, normed_n);
      __syncwarp();
      in = norm ? normed_n : y_n;
      if (kBackward) z_n += layer.out_size, y_n += layer.out_size, normed_n += layer.out_size;
    }
    return in;
  }

  // ---- a table in place of the MLP

  // Where the splines that count at this lane's edge begin in the table, and their weights.
  struct Cell {
    int first;
    SplinePieces<N> pieces;
  };
  __device__ __forceinline__ Cell cell() const {
    const N position = spline_position(p, e.radius);
    const int at = spline_cell(p, value_of(position)), type = p.n_attr ? spline_type(p, value_of(e.attr[0])) : 0;
    const int first = (type * static_cast<int>(splines_per_type(p)) + at) * table_row;
    return {first, spline_pieces(p, e.radius, position, static_cast<R>(at))};
  }

  __device__ __forceinline__ bool has_table() const { return p.n_knots; }

  // f(place among the channels' coefficients, place in a row) for those that couplings read, -1 for others.
  template <typename F>
  __device__ __forceinline__ void for_coefficients(int begin, int step, F f) const {
    const int stride = p.n_read ? table_row / p.n_read : 0;
    for (int x = begin; x < p.hidden_flat; x += step) {
      const int k = x / p.channels, w = x % p.channels;
      f(w * p.c + k, k < p.n_read ? k * stride + w : -1);
    }
  }

  // Σ factor times the row's number, of the four rows at `piece`
  __device__ __forceinline__ N blend(const N (&factors)[SplinePieces<N>::n], const N* piece) const {
    N sum{};
#pragma unroll
    for (int j = 0; j < SplinePieces<N>::n; ++j) sum += factors[j] * piece[j * table_row];
    return sum;
  }

  __device__ __forceinline__ const N* splines() {
    if (active) {
      const Cell here = cell();
      const N* const rows = weights + p.table_at + here.first;
      for_coefficients(sub, lanes,
                       [&](int to, int at) { y[to] = at < 0 ? N{} : blend(here.pieces.weights, rows + at); });
    }
    __syncwarp();
    return y;
  }

  // What the couplings read, in their coordinates: `features`; the MLP's output itself: `coefficients`.
  const N *features, *coefficients;
  __device__ __forceinline__ void hidden_features() {
    coefficients = features = has_table() ? splines() : p.n_layers ? layers(p.n_layers - 1, true) : e.inputs;
    if (p.kind != kPlanar) return;
    for (int w = sub; w < p.channels && active; w += lanes)
      for (int m = 0; m < p.c; ++m) hidden[w * p.c + m] = turned(p, e.first, e.second, coefficients + w * p.c, m);
    features = hidden;
    __syncwarp();
  }

  // Everything up to the products.
  __device__ __forceinline__ void evaluate() {
    enter_frame(false);
    if (active) factors(g);
    if (!p.n_layers) __syncwarp();
    hidden_features();
    if (active) products();
  }

  // ---- sums over the edges of a node

  // f(coupling, first slot, slots, positions of the row's channels, place of the products) for every block of every
  // group of slots.
  template <typename F>
  __device__ __forceinline__ void for_blocks(F f) const {
    for (int k = 0; k < p.n_couplings; ++k) {
      const CouplingView q = coupling_view(k);
      for (int n = 0; n < q.n_groups; ++n) {
        const int32_t *group = q.groups + 4 * n, *block = q.blocks + 2 * group[2];
        for (int left = group[3]; left > 0; --left, block += 2)
          f(q, group[0], group[1], p.row + p.row_start[block[0]], block[1]);
      }
    }
  }

  // T += Σ t ⊗ h over the edges l0 .. l1-1 of the tile, all into one node. A lane owns the same entries of a coupling's
  // T at every call.
  __device__ __forceinline__ void accumulate(N* sums, int l0, int l1) const {
    for_blocks([&](const CouplingView& q, int first_slot, int n_slots, const int32_t* row, int at) {
      const int width = row_width(q.n_hidden), step = 32 / width;
      for (int s = 0; s < n_slots; ++s) {
        N* const of_slot = sums + q.at_sums + (first_slot + s) * q.theta_size;
        for (int w = lane & (width - 1); w < q.n_hidden; w += width)
          for (int v = lane / width; v < q.n_in; v += step) {
            const N* product = of_edge(t + at + s * q.in_stride + v, l0);
            const N* h = of_edge(features + (q.constant ? 0 : row[w]), l0);
            N sum{};
#pragma unroll 2
            for (int l = l0; l < l1; ++l, product += edge_size, h += edge_size)
              sum += q.constant ? *product : *product * *h;
            of_slot[v * q.hidden_stride + w] += sum;
          }
      }
    });
  }

  __device__ __forceinline__ void clear(N* numbers, int64_t n) {
    for (int64_t k = lane; k < n; k += 32) numbers[k] = N{};
  }

  // Walks the warp's edges: nodes.start(i) before a node's first edge here, run(l0, l1) for the edges of a tile that
  // go into it, nodes.finish(i) after its last one here; begin_tile() and end_tile() around each tile.
  template <typename Nodes>
  __device__ __forceinline__ void walk(Nodes& nodes) {
    int64_t current = -1;
    for (int64_t at = first; at < last; at += tile) {  // loop: tiles
      load(at, last);
      nodes.begin_tile();
      evaluate();
      __syncwarp();
      for (int l = 0, stop; l < n_edges; l = stop) {
        const int64_t i = from_lane(node, l * lanes);
        stop = l + __popc(__ballot_sync(kWarp, active && sub == 0 && node == i));
        if (i != current) {
          if (current >= 0) nodes.finish(current);
          nodes.start(current = i);
        }
        nodes.run(l, stop);
      }
      nodes.end_tile();
      __syncwarp();
    }
    nodes.finish(current);
  }
};

}  // namespace implicit_steer::IST_ISA
