// One thread's buffers, and what both directions do with a tile: L edges, consecutive in target order.
#pragma once

#include "../edge_mlp.h"
#include "conv.h"
#include "rows.h"

namespace implicit_steer::IST_ISA {

constexpr int kNodes = 8;  // nodes whose sums T are mixed together

// Sets the couplings' positions in a worker's buffers. The sizes are in numbers, dual or not.
template <typename R>
CouplingSizes place_couplings(PlanView<R>& p) {
  CouplingSizes size;
  for (int k = 0; k < p.n_couplings; ++k) {
    CouplingView& q = p.couplings[k];
    q.at_sums = size.sums, q.at_slots = size.slots;
    size.sums += int64_t{q.n_slots} * q.n_hidden * q.in_stride;
    size.slots += int64_t{q.n_slots} * q.in_stride * q.hidden_stride;
  }
  return size;
}

// Slots of a coupling that read the same rows; their T lie at `sums` as [w][slot, v] with rows of `width` numbers, or
// at `slots` as [slot, v][w].
struct Group {
  const CouplingView& q;
  int first, n_slots;
  int64_t width, sums, slots;
};
template <typename F>
IST_INLINE void for_groups(const CouplingView* couplings, int n, F f) {
  for (int k = 0; k < n; ++k) {
    const CouplingView& q = couplings[k];
    for (const int32_t* group = q.groups; group < q.groups + 4 * q.n_groups; group += 4) {
      const int64_t before = int64_t{group[0]} * q.in_stride;
      f(Group{q, group[0], group[1], int64_t{group[1]} * q.in_stride, q.at_sums + before * q.n_hidden,
              q.at_slots + before * q.hidden_stride},
        q.blocks + 2 * group[2], group[3]);
    }
  }
}

// R: float, double or, for derivatives along a direction, dual numbers of them.
template <typename R>
struct Worker {
  using V = typename Lane<R>::V;
  static constexpr int L = Lane<R>::L;

  const ConvArgs<Real<R>>& a;
  PlanView<Real<R>>& p;
  const R* weights;  // packed
  bool backward;
  int64_t n_extra;
  V* extra;          // [n_extra] for derived classes
  int64_t capacity;  // of the list of near edges: all edges that are this worker's
  CouplingSizes size;
  Edges<R> e;
  Mlp<R> mlp;
  R shell;
  V *hidden, *d_hidden;   // [flat hidden size] in the couplings' coordinates
  const V* features;      // [flat hidden size] `hidden`, or in frames without a way back the MLP's last features
  V* h;                   // all rows' channels, and last the constant one, times the radial factor
  const R* inputs[L];     // [n_gathered] of the neighbours, by field type
  V* g;                   // [n_g]
  R *t, *d_t;             // [L, product_size] products f · G
  R* d_f;                 // [L, n_gathered]
  R* d_harmonics;         // [d, L, QL] sums over QL are the harmonics' gradients
  R* d_one;               // [L, QL] as these, of the constant one in h
  R* d_rows;              // per row [L, padded W]
  R* sums;                // T of kNodes nodes, or in the reverse sweep of one, as [w][slot, v]
  R *slot_sums, *d_sums;  // T and ∂L/∂T of kNodes nodes, as [slot, v][w]
  R* d_sums_t;            // ∂L/∂T of one node, as [w][slot, v]
  R* d_theta;             // [b][u][v, w]
  R* mixed;               // [kNodes, n_mixed] outputs or their gradients, by field type
  R* grads;               // [kNodes, n_mixed] of the nodes in the ring
  int64_t* row_at;        // [n_rows] positions in d_rows
  int64_t row_size;       // of all rows together
  Unit<R>* row_units;     // all rows' channels
  int n_row_units = 0;
  int64_t edge[L];       // edge numbers; padding repeats the last
  int64_t source[L];     // the neighbours
  int n_edges;           // of the tile
  int64_t ring[kNodes];  // nodes whose T are complete
  int n_ring = 0;
  bool untouched = true;  // the T of the current node
  // Edges near the origin in regular frames: the tile in which they come counts them as absent and puts them into this
  // list, which is gone through afterwards, so that no other edge takes the slow way.
  bool near_pass = false;
  uint32_t near_lanes = 0;         // of the tile
  int64_t *near_edge, *near_node;  // [capacity]
  int64_t n_near = 0;

  Worker(const ConvArgs<Real<R>>& args, const CouplingSizes& sizes, bool is_backward, int64_t own_edges,
         int64_t n_extra = 0)
      : a(args),
        p(*args.plan),
        weights(reinterpret_cast<const R*>(args.weights)),
        backward(is_backward),
        n_extra(n_extra),
        capacity(p.regular ? own_edges : 0),
        size(sizes) {
    shell = weights[p.shell];
    Arena count{nullptr};
    place(count);
    const int64_t zeroed = count.used;
    place_list(count);
    Arena arena{static_cast<char*>(a.scratch(count.used))};
    memset(static_cast<void*>(arena.base), 0,
           zeroed);  // the list is written before it is read: no page of it is touched
    place(arena);
    place_list(arena);
    if (backward) list_units();
    for (int k = 0; k < p.n_g; ++k) {
      g[k] = V{};
      for (int z = p.g_first[k]; z < p.g_first[k + 1]; ++z) g[k] += p.nz_value[z];
    }
  }

  void list_units() {
    constexpr int QL = Lane<R>::QL;
    int64_t at = 0;
    for (int r = 0; r < p.n_rows; ++r) {
      const int n = p.row_start[r + 1] - p.row_start[r];
      const int64_t pad = padded(n);
      row_at[r] = at;
      for (int w = 0; w < n; w += QL) {
        Unit<R>& unit = row_units[n_row_units++];
        unit.at = at + w, unit.pad = pad;
        for (int j = 0; j < QL; ++j) unit.position[j] = w + j < n ? p.row[p.row_start[r] + w + j] : -1;
      }
      at += L * pad;
    }
  }

  void place(Arena& arena) {
    const int L_QL = L * Lane<R>::QL;
    e.place(arena, p, backward), mlp.place(arena, p, weights, backward);
    arena.take(hidden, p.hidden_flat), arena.take(h, p.row_start[p.n_rows] + 1);
    arena.take(g, p.n_g), arena.take(t, int64_t{L} * p.product_size), arena.take(mixed, kNodes * p.n_mixed);
    arena.take(sums, (backward ? 1 : kNodes) * size.sums), arena.take(extra, n_extra);
    if (!backward) return;
    row_size = 0;
    for (int r = 0; r < p.n_rows; ++r) row_size += L * padded(p.row_start[r + 1] - p.row_start[r]);
    arena.take(row_units, row_size / L_QL), arena.take(row_at, p.n_rows), arena.take(d_rows, row_size);
    arena.take(d_hidden, p.hidden_flat), arena.take(d_t, int64_t{L} * p.product_size);
    arena.take(d_f, int64_t{L} * p.n_gathered), arena.take(d_harmonics, p.d * L_QL), arena.take(d_one, L_QL);
    arena.take(grads, kNodes * p.n_mixed), arena.take(d_theta, theta_size());
    arena.take(slot_sums, kNodes * size.slots), arena.take(d_sums, kNodes * size.slots);
    arena.take(d_sums_t, size.sums);
  }

  void place_list(Arena& arena) { arena.take(near_edge, capacity), arena.take(near_node, capacity); }

  // θ [b][u][v, w] of all couplings, one after the other in the packed weights
  int64_t theta_size() const { return p.n_couplings ? p.n_grad - p.couplings[0].theta : 0; }

  // ---- one tile

  // lanes [n] from rows of n numbers, one per edge, of `from` or, where there are tangents, of both
  void load_edges(int n, const Real<R>* from, const Real<R>* tangent, V* lanes) {
    const Real<R>* const arrays[] = {from, tangent};
    for (int k = 0; k < kPlanes<R>; ++k) {
      const auto row = [this, n, array = arrays[k]](int l) { return array + edge[l] * n; };
      const auto inside = [=](int l, int at, int count) { return edge[l] * n + at + count <= a.n_edges * n; };
      rows_to_lanes<Real<R>>(n, row, inside, plane<R>(lanes, k), kPlanes<R>);
    }
  }

  void load_geometry() {
    load_edges(p.dim, a.delta, a.delta_tangent, opaque_pointer(e.delta));
    if (p.n_attr) load_edges(p.n_attr, a.attr, a.attr_tangent, e.attr);
  }

  // Edges order[begin ..] or, in the near pass, near_edge[begin ..]; lanes past the end repeat the last edge.
  void load(int64_t begin, int64_t end) {
    n_edges = end - begin < L ? static_cast<int>(end - begin) : L;
    a.index64 ? find_edges<int64_t>(begin) : find_edges<int32_t>(begin);
    for (int l = 0; l < n_edges; ++l)
      for (int k = 0; k < p.n_gathered; k += 64 / sizeof(R)) __builtin_prefetch(inputs[l] + k);
    load_geometry();
  }

  template <typename I>
  void find_edges(int64_t begin) {
    const I *order = static_cast<const I*>(a.order), *src = static_cast<const I*>(a.src);
    const R* features = static_cast<const R*>(a.features ? a.features : static_cast<const void*>(a.x));
    const int last = n_edges - 1;
    const int64_t stride = p.n_gathered;
    for (int l = 0; l < L; ++l) {
      const int64_t at = begin + (l < last ? l : last), e = near_pass ? near_edge[at] : order[at];
      edge[l] = e, source[l] = src[e], inputs[l] = features + source[l] * stride;
    }
  }

  // The frame, and which lanes count: those of edges of this tile, but for near ones outside the near pass.
  void enter_frame(bool all_harmonics) {
    e.near_origin = near_pass;
    frame_forward(p, shell, e, all_harmonics);
    near_lanes = 0;
    if (!p.regular || near_pass) return;
    near_lanes = lane_bits(e.radius < Limits<Real<R>>::near) & ((1u << n_edges) - 1);
  }
  // 1 in these lanes, 0 in others
  typename Lane<Real<R>>::V counting_lanes() const {
    typename Lane<Real<R>>::V lanes;
    for (int l = 0; l < L; ++l) lanes[l] = l < n_edges && !(near_lanes >> l & 1);
    return lanes;
  }

  // Hidden features times the radial factor, and products.
  void evaluate() {
    enter_frame(false);
    features = mlp.hidden(e);
    if (p.kind == kPlanar) {
      expand_forward(p, e, features, hidden);
      features = hidden;
    }
    const int n = p.row_start[p.n_rows];
    for (int k = 0; k < n; ++k) h[k] = features[p.row[k]] * e.factor;
    h[n] = e.factor;
    for (int k = 0; k < p.n_g && p.kind == kZonal; ++k) {
      if (p.nz_harmonic[p.g_first[k]] < 0) continue;  // constant
      V sum{};
      for (int z = p.g_first[k]; z < p.g_first[k + 1]; ++z) sum += e.first[p.nz_harmonic[z]] * p.nz_value[z];
      g[k] = sum;
    }
    for (const int32_t* product = p.products; product < p.products + 4 * p.n_products; product += 4)
      sum_products(product, p.g_from, [&](int k) { return g + k; }, inputs, t, p.product_size);
  }

  // out[l][place + v] = Σ_k in[l][from[k] + v] factor(k)[l] for all edges l; sum: place, padded V, first k, one past
  // the last.
  template <typename Factor>
  IST_INLINE void sum_products(const int32_t* sum, const int32_t* from, Factor factor, const R* const* in, R* out,
                               int64_t stride) {
    const int first = sum[2], last = sum[3];
    for (int x = 0; x < sum[1]; x += Lane<R>::QL) {
      R* to = out + sum[0] + x;
      int k = first;
      switch ((last - first) % 3) {
        case 1:
          add_products<true, 1>(from + k, x, factor(k), nullptr, nullptr, in, to, stride);
          k += 1;
          break;
        case 2:
          add_products<true, 2>(from + k, x, factor(k), factor(k + 1), nullptr, in, to, stride);
          k += 2;
          break;
        default:
          if (first == last)
            add_products<true, 0>(from, x, nullptr, nullptr, nullptr, in, to, stride);
          else
            add_products<true, 3>(from + k, x, factor(k), factor(k + 1), factor(k + 2), in, to, stride);
          k += 3;
      }
      for (; k < last; k += 3)
        add_products<false, 3>(from + k, x, factor(k), factor(k + 1), factor(k + 2), in, to, stride);
    }
  }
  // The same of N terms, N <= 3, as many as addresses stay in registers; the first ones, or added to what is there.
  template <bool kFirst, int N>
  IST_INLINE void add_products(const int32_t* from, int x, const V* a0, const V* a1, const V* a2, const R* const* in,
                               R* out, int64_t stride) {
    const V* const factors[] = {a0, a1, a2};
    int64_t at[3] = {};
    for (int k = 0; k < N; ++k) at[k] = from[k] + x;
    const int lanes = n_edges;
    for (int l = 0; l < lanes; ++l, out += stride) {
      typename Lane<R>::Q total{};
      if (!kFirst) total = load_row(out);
      for (int k = 0; k < N; ++k) total += load_row(in[l] + at[k]) * number(*factors[k], l);
      store_row(out, total);
    }
  }

  // f(group, row, position of the products)
  template <typename F>
  IST_INLINE void for_blocks(F f) {
    for_groups(p.couplings, p.n_couplings, [&](const Group& group, const int32_t* blocks, int n_blocks) {
      for (int k = 0; k < n_blocks; ++k) f(group, blocks[2 * k], blocks[2 * k + 1]);
    });
  }

  // T = h ⊗ t over the lanes l0 .. l1-1, all into one node; added to that of its earlier lanes.
  void accumulate(R* node, int l0, int l1) {
    for_groups(p.couplings, p.n_couplings, [&](const Group& group, const int32_t* blocks, int n_blocks) {
      for (int k = 0; k < n_blocks; ++k) {
        const auto update = [&](auto add) {
          rank_updates<decltype(add)::value == 1>(group.q.n_hidden, node + group.sums, group.width,
                                                  lanes_of(h + p.row_start[blocks[2 * k]]), t + blocks[2 * k + 1],
                                                  p.product_size, l0, l1, group.width);
        };
        untouched&& k == 0 ? update(Count<0>{}) : update(Count<1>{});
      }
    });
    untouched = false;
  }

  // After a node's last edge: where all of them were deferred, nothing has been written yet.
  void complete(R* node) {
    if (untouched) memset(static_cast<void*>(node), 0, sizeof(R) * size.sums);
  }

  // Walks the nodes first .. last-1: start(i) before a node's first edge, run(l0, l1) for the lanes of a tile that
  // belong to it, finish(i) after its last, empty(i) instead where it has none; end_tile() after each tile. Then, in
  // the near pass, the nodes with near edges once more.
  template <typename Start, typename Run, typename Finish, typename Empty, typename EndTile>
  void walk(int64_t first, int64_t last, Start start, Run run, Finish finish, Empty empty, EndTile end_tile) {
    int64_t node = first, next = a.index(a.rowptr, first), node_end = a.index(a.rowptr, first + 1);
    const int64_t end = a.index(a.rowptr, last);
    bool started = false;
    for (; next < end; next += n_edges) {
      load(next, end);
      evaluate();
      for (int l = 0; l < n_edges;) {
        while (node_end <= next + l) {
          started ? finish(node) : empty(node);
          started = false;
          node_end = a.index(a.rowptr, ++node + 1);
        }
        if (!started) start(node);
        started = true;
        const int stop = node_end - next < n_edges ? static_cast<int>(node_end - next) : n_edges;
        if (near_lanes)
          run_far(node, l, stop, run);
        else
          run(l, stop);
        l = stop;
      }
      end_tile();
    }
    for (; node < last; ++node, started = false) started ? finish(node) : empty(node);
  }

  // Points begin .. or, in the near pass, of the list; without neighbours.
  void load_points(int64_t begin, int64_t end) {
    n_edges = end - begin < L ? static_cast<int>(end - begin) : L;
    for (int l = 0; l < L; ++l) {
      const int64_t at = begin + (l < n_edges ? l : n_edges - 1);
      edge[l] = near_pass ? near_edge[at] : at;
    }
    load_geometry();
  }

  // f() for every tile of points, which calls enter_frame().
  template <typename F>
  void points(int64_t begin, int64_t end, F f) {
    for (int64_t at = begin; at < end; at += L) {
      load_points(at, end);
      f();
      if (near_lanes) defer(0, 0, n_edges);
    }
    near_pass = true;
    for (int64_t at = 0; at < n_near; at += L) {
      load_points(at, n_near);
      f();
    }
  }

  // run() for the lanes between near ones, which are deferred
  template <typename Run>
  void run_far(int64_t node, int l0, int l1, Run run) {
    defer(node, l0, l1);
    for (int l = l0; l < l1; l = l0 + 1) {
      for (l0 = l; l0 < l1 && !(near_lanes >> l0 & 1);) ++l0;
      if (l < l0) run(l, l0);
    }
  }

  void defer(int64_t node, int l0, int l1) {
    for (int l = l0; l < l1; ++l)
      if (near_lanes >> l & 1) near_edge[n_near] = edge[l], near_node[n_near++] = node;
  }

  template <typename Start, typename Run, typename Finish, typename EndTile>
  void walk_near(Start start, Run run, Finish finish, EndTile end_tile) {
    near_pass = true;
    for (int64_t next = 0; next < n_near; next += n_edges) {
      load(next, n_near);
      evaluate();
      for (int l = 0; l < n_edges;) {
        const int64_t node = near_node[next + l];
        int stop = l + 1;
        while (stop < n_edges && near_node[next + stop] == node) ++stop;
        start(node), run(l, stop), finish(node);
        l = stop;
      }
      end_tile();
    }
  }

  // ---- the reverse sweep of one tile

  // From d_hidden: gradients of the weights and, with `need_inputs`, of the frame.
  void sweep_mlp(bool need_weights, bool need_inputs) {
    e.d_radius = V{};
    for (int m = 0; m < p.d; ++m) e.d_first[m] = e.d_second[m] = V{};
    if (p.kind == kPlanar) {
      expand_backward(p, e, mlp.normed + mlp.size_z - p.hidden_flat, d_hidden, mlp.d_y);
    } else {
      V* d_y = p.n_layers ? mlp.d_y : e.d_inputs;
      for (int k = 0; k < p.hidden_flat; ++k) d_y[k] = d_hidden[k];
    }
    if (p.n_layers) mlp.backward(e, need_weights, need_inputs);
  }

  void sweep_frame() {
    frame_backward(p, shell, e);
    if (a.grad_delta) store(opaque_pointer(e.d_delta), p.dim, a.grad_delta);
    if (a.grad_attr) store(e.d_attr, p.n_attr, a.grad_attr);
  }

  // lanes [n], of dual numbers the tangents, -> rows_out[edge, n]
  void store(const V* lanes, int n, Real<R>* rows_out) {
    const auto row = [&](int l) { return rows_out + edge[l] * n; };
    lanes_to_rows<Real<R>>(n, plane<R>(lanes, kPlanes<R> - 1), kPlanes<R>, row, n_edges);
  }

  // The gradients of all weights but the mixing ones.
  void write_mlp_weights(Real<R>* out) {
    const V *d_w = mlp.d_w, *d_b = mlp.d_b, *d_affine = mlp.d_affine;
    for (int n = 0; n < p.n_layers; ++n) {
      const LayerView<Real<R>>& layer = p.layers[n];
      for (int k = 0; k < layer.n_values; ++k) out[layer.weight + k] = result(lane_sum(d_w[k]));
      for (int k = 0; k < layer.out_size; ++k) out[layer.bias + k] = result(lane_sum(d_b[k]));
      d_w += layer.n_values, d_b += layer.out_size;
      if (!p.has_norms) continue;
      for (int k = 0; k < mlp.affine_size(); ++k) out[layer.affine + k] = result(lane_sum(d_affine[k]));
      d_affine += mlp.affine_size();
    }
    out[p.shell] = result(lane_sum(e.d_shell) / (shell * shell * shell));
  }
};

// First node of thread t: edges plus nodes are shared out evenly, whole nodes to one thread.
template <typename R>
int64_t first_node(const ConvArgs<R>& a, int t) {
  const int64_t target = (a.n_edges + a.n_dst) * t / a.threads;
  int64_t low = 0, high = a.n_dst;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.index(a.rowptr, middle) + middle < target)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace implicit_steer::IST_ISA
