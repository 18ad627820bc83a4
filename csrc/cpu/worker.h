// One thread's buffers, and what both directions do with a tile: L edges, consecutive in target order.
#pragma once

#include "../edge_mlp.h"
#include "conv.h"
#include "rows.h"

namespace implicit_steer::IST_ISA {

constexpr int kNodes = 8;  // nodes whose sums T are mixed together

// Sets the couplings' positions in a worker's buffers. Rows of channels are padded:
//   T [slot][v, w] with w padded, or [slot][v] where the hidden feature is the constant one
//   Tᵀ [slot][w][v] with v padded
// The sizes are in numbers, dual or not.
template <typename R>
CouplingSizes place_couplings(PlanView<R>& p) {
  CouplingSizes size;
  for (int k = 0; k < p.n_couplings; ++k) {
    CouplingView& q = p.couplings[k];
    q.hidden_padded = q.constant ? 1 : static_cast<int32_t>(padded(q.n_hidden));
    q.in_padded = static_cast<int32_t>(padded(q.n_in));
    q.out_padded = static_cast<int32_t>(padded(q.n_out));
    q.slot_size = padded(int64_t{q.n_in} * q.hidden_padded);
    q.at_sums = size.sums, q.at_sums_t = size.sums_t, q.at_d_terms = size.d_terms;
    size.sums += q.n_slots * q.slot_size;
    size.sums_t += int64_t{q.n_slots} * q.n_hidden * q.in_padded;
    size.d_terms += int64_t{q.n_terms} * Lane<R>::L * q.in_padded;
  }
  return size;
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
  V *hidden, *d_hidden;            // [flat hidden size] in the couplings' coordinates
  V *f_raw, *d_f_raw;              // [C_in] neighbour features
  V *f, *d_f;                      // [n_gathered] the same gathered by field type, times the radial factor
  V *g, *d_g;                      // [n_g]
  V *t, *d_t;                      // [product_size] products f · G
  R *rows, *d_rows;                // per row [L, padded W]
  R* d_terms;                      // per coupling [term][L, padded V]
  R* sums;                         // T [kNodes, size.sums]
  R *d_theta, *d_sums, *d_sums_t;  // [b][u][v, w]; ∂L/∂T [kNodes, size.sums]; of one node, [slot][w][v]
  R* mixed;                        // [kNodes, n_mixed] outputs or their gradients, by field type
  R* grads;                        // [kNodes, n_mixed] of the nodes in the ring
  int64_t* row_at;                 // [n_rows] positions in rows
  int64_t row_size;                // of all rows together
  Unit<R>* row_units;              // all rows' channels
  Unit<R>* term_units;             // all terms' (term, v), in t and d_terms
  int n_row_units = 0, n_term_units = 0;
  int64_t edge[L];       // edge numbers; padding repeats the last
  int n_edges;           // of the tile
  int64_t ring[kNodes];  // nodes whose T are complete
  int n_ring = 0;
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
    list_units();
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
    for (int k = 0; k < p.n_couplings && backward; ++k) {
      const CouplingView& q = p.couplings[k];
      for (int n = 0; n < q.n_terms; ++n)
        for (int v = 0; v < q.n_in; v += QL) {
          Unit<R>& unit = term_units[n_term_units++];
          unit.at = q.at_d_terms + int64_t{n} * L * q.in_padded + v, unit.pad = q.in_padded;
          for (int j = 0; j < QL; ++j) unit.position[j] = v + j < q.n_in ? q.terms[3 * n + 2] + v + j : -1;
        }
    }
  }

  void place(Arena& arena) {
    e.place(arena, p, backward), mlp.place(arena, p, weights, backward);
    row_size = 0;
    for (int r = 0; r < p.n_rows; ++r) row_size += L * padded(p.row_start[r + 1] - p.row_start[r]);
    arena.take(row_units, row_size / (L * Lane<R>::QL)), arena.take(row_at, p.n_rows), arena.take(rows, row_size),
        arena.take(hidden, p.hidden_flat);
    arena.take(f_raw, p.in_size), arena.take(f, p.n_gathered), arena.take(g, p.n_g), arena.take(t, p.product_size);
    arena.take(sums, kNodes * size.sums), arena.take(mixed, kNodes * p.n_mixed);
    arena.take(extra, n_extra);
    if (!backward) return;
    arena.take(term_units, size.d_terms / (L * Lane<R>::QL)), arena.take(d_hidden, p.hidden_flat),
        arena.take(d_f_raw, p.in_size), arena.take(d_f, p.n_gathered), arena.take(grads, kNodes * p.n_mixed);
    arena.take(d_g, p.n_g), arena.take(d_t, p.product_size), arena.take(d_rows, row_size);
    arena.take(d_terms, size.d_terms), arena.take(d_theta, theta_size());
    arena.take(d_sums, kNodes * size.sums), arena.take(d_sums_t, size.sums_t);
  }

  void place_list(Arena& arena) { arena.take(near_edge, capacity), arena.take(near_node, capacity); }

  // θ [b][u][v, w] of all couplings, one after the other in the packed weights
  int64_t theta_size() const { return p.n_couplings ? p.n_grad - p.couplings[0].theta : 0; }

  // ---- one tile

  // lanes [n] from row(l) + offset of `from`, or where there are tangents, of both; `inside` as in rows_to_lanes.
  template <typename Row, typename Inside>
  void load_rows(int n, const Real<R>* from, const Real<R>* tangent, Row row, Inside inside, V* lanes) {
    const Real<R>* const arrays[] = {from, tangent};
    for (int k = 0; k < kPlanes<R>; ++k) {
      const Real<R>* array = arrays[k];
      rows_to_lanes<Real<R>>(n, [=](int l) { return array + row(l); }, inside, plane<R>(lanes, k), kPlanes<R>);
    }
  }

  void load_edges(int n, const Real<R>* from, const Real<R>* tangent, V* lanes) {
    load_rows(
        n, from, tangent, [=](int l) { return edge[l] * n; },
        [=](int l, int at) { return edge[l] * n + at + L <= a.n_edges * n; }, lanes);
  }

  void load_geometry() {
    load_edges(p.dim, a.delta, a.delta_tangent, whole(e.delta));
    if (p.n_attr) load_edges(p.n_attr, a.attr, a.attr_tangent, e.attr);
  }

  // Edges order[begin ..] or, in the near pass, near_edge[begin ..]; lanes past the end repeat the last edge, with
  // features 0.
  void load(int64_t begin, int64_t end) {
    n_edges = end - begin < L ? static_cast<int>(end - begin) : L;
    const int64_t n = p.in_size;
    int64_t source[L];
    for (int l = 0; l < L; ++l) {
      const int64_t at = begin + (l < n_edges ? l : n_edges - 1);
      edge[l] = near_pass ? near_edge[at] : a.index(a.order, at);
      source[l] = a.index(a.src, edge[l]) * n;
    }
    load_geometry();
    load_rows(
        p.in_size, a.x, a.x_tangent, [&](int l) { return source[l]; },
        [&](int l, int at) { return source[l] + at + L <= a.n_src * n; }, f_raw);
  }

  // The frame, and which lanes count: those of edges of this tile, but for near ones outside the near pass.
  void enter_frame(bool all_harmonics) {
    e.near = near_pass;
    frame_forward(p, shell, e, all_harmonics);
    near_lanes = 0;
    if (!p.regular || near_pass) return;
    const auto small = e.radius < Limits<Real<R>>::near;
    for (int l = 0; l < n_edges; ++l) near_lanes |= static_cast<uint32_t>(small[l] != 0) << l;
  }
  // 1 in these lanes, 0 in others
  typename Lane<Real<R>>::V counting_lanes() const {
    typename Lane<Real<R>>::V lanes;
    for (int l = 0; l < L; ++l) lanes[l] = l < n_edges && !(near_lanes >> l & 1);
    return lanes;
  }

  // Hidden features, in the couplings' coordinates, as rows of channels per edge; G and t.
  void evaluate() {
    enter_frame(false);
    if (near_lanes || n_edges < L) {
      const auto inside = counting_lanes() > 0;
      for (int k = 0; k < p.in_size; ++k) f_raw[k] = select(inside, f_raw[k], V{});
    }
    const V* y = mlp.hidden(e);
    if (p.kind == kPlanar) {
      expand_forward(p, e, y, hidden);
      y = hidden;
    }
    units_to_rows<R>(n_row_units, row_units, y, rows);
    for (int k = 0; k < p.n_gathered; ++k) f[k] = f_raw[p.input[k]] * e.factor;
    if (p.kind == kZonal)
      for (int k = 0; k < p.n_g; ++k) {
        if (p.nz_harmonic[p.g_first[k]] < 0) continue;  // constant
        V sum{};
        for (int z = p.g_first[k]; z < p.g_first[k + 1]; ++z) sum += e.cosine[p.nz_harmonic[z]] * p.nz_value[z];
        g[k] = sum;
      }
    for (int n = 0; n < p.n_products; ++n) {
      const int32_t* product = p.products + 5 * n;
      const int n_in = product[1];
      const V* in = f + product[0];
      V* out = t + product[4];
      int v = 0;
      for (; v + 8 <= n_in; v += 8) product_forward<8>(product, in + v, out + v);
      for (; v + 2 <= n_in; v += 2) product_forward<2>(product, in + v, out + v);
      for (; v < n_in; ++v) product_forward<1>(product, in + v, out + v);
    }
  }

  // t[v] = Σ_g f[i_g, v] G_g for N fields
  template <int N>
  IST_INLINE void product_forward(const int32_t* product, const V* in, V* out) {
    V sum[N] = {};
    for (int i = product[2]; i < product[3]; ++i) {
      const V factor = g[i];
      const V* input = whole(in + p.g_input[i] * product[1]);
      for (int v = 0; v < N; ++v) sum[v] += input[v] * factor;
    }
    for (int v = 0; v < N; ++v) out[v] = sum[v];
  }

  // T += Σ t ⊗ h over the lanes l0 .. l1-1, all into one node.
  void accumulate(R* node, int l0, int l1) {
    for (int k = 0; k < p.n_couplings; ++k) {
      const CouplingView& q = p.couplings[k];
      if (q.constant) {
        accumulate_constant(q, node + q.at_sums, l0, l1);
        continue;
      }
      for (int n = 0; n < q.n_terms; ++n) {
        const int32_t* term = q.terms + 3 * n;
        rank_updates(q.n_in, node + q.at_sums + term[0] * q.slot_size, q.hidden_padded, lanes_of(t + term[2]),
                     rows + row_at[term[1]], q.hidden_padded, l0, l1, q.hidden_padded);
      }
    }
  }

  // The same where the hidden feature is the constant one: sums over lanes, L of them at a time.
  void accumulate_constant(const CouplingView& q, R* sums_of_node, int l0, int l1) {
    V block[L];
    R* target[L];
    typename Lane<Real<R>>::V inside;
    for (int l = 0; l < L; ++l) inside[l] = l0 <= l && l < l1;
    const bool whole_tile = l0 == 0 && l1 == L;
    int count = 0;
    const auto reduce = [&] {
      const V total = lane_sums<L>(block);
      for (int k = 0; k < count; ++k) *target[k] += number(total, k);
      count = 0;
    };
    for (int n = 0; n < q.n_terms; ++n) {
      const int32_t* term = q.terms + 3 * n;
      for (int v = 0; v < q.n_in; ++v) {
        const V x = t[term[2] + v];
        block[count] = whole_tile ? x : select(inside > 0, x, V{});
        target[count++] = sums_of_node + term[0] * q.slot_size + v;
        if (count == L) reduce();
      }
    }
    if (count == 0) return;
    for (int k = count; k < L; ++k) block[k] = V{};
    reduce();
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
        run(l, stop);
        if (near_lanes) defer(node, l, stop);
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
    for (int m = 0; m < p.d; ++m) e.d_cosine[m] = e.d_sine[m] = V{};
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
    if (a.grad_delta) store(whole(e.d_delta), p.dim, a.grad_delta);
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
      for (int k = 0; k < layer.out; ++k) out[layer.bias + k] = result(lane_sum(d_b[k]));
      d_w += layer.n_values, d_b += layer.out;
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
