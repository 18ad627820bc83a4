// L edges, one in each lane: which they are, their hidden features, and the reverse sweep of these.
#pragma once

#include "../edge_mlp.h"
#include "conv.h"
#include "near_list.h"
#include "rows.h"
#include "splines.h"

namespace implicit_steer::IST_ISA {

// R: float, double or, for derivatives along a direction, dual numbers of them.
template <typename R>
struct EdgeTile {
  using V = typename Lane<R>::V;
  static constexpr int L = Lane<R>::L;

  const ConvArgs<Real<R>>& a;
  const PlanView<Real<R>>& p;
  const R* weights;  // packed
  const R shell;
  int n_edges = 0;          // lanes past them repeat the last one
  int64_t edge[L];          // edge numbers
  int64_t source[L];        // the neighbours
  const R* inputs[L];       // [n_gathered] of the neighbours, by field type
  uint32_t near_lanes = 0;  // of edges that are left to the tiles of a NearList
  Edges<R> e;
  Mlp<R> mlp;
  Splines<R> splines;    // in its place, of plans with a table
  const V* features;     // [flat hidden size] in the couplings' coordinates
  V *hidden, *d_hidden;  // memory for them in frames with a way back; their gradient

  explicit EdgeTile(const ConvArgs<Real<R>>& args)
      : a(args), p(*args.plan), weights(reinterpret_cast<const R*>(args.weights)), shell(weights[p.shell_at]) {}

  void place(Arena& arena, bool backward) {
    e.place(arena, p, backward);
    if (p.n_knots)
      splines.place(arena, p, weights, backward);
    else
      mlp.place(arena, p, weights, backward);
    arena.take(hidden, p.hidden_flat);
    if (backward) arena.take(d_hidden, p.hidden_flat);
  }

  // ---- which edges

  // Edges begin .. end-1 in target order, as many as there are lanes.
  void load(int64_t begin, int64_t end) {
    e.near_origin = false;
    if (a.index64)
      number_lanes(begin, end, static_cast<const int64_t*>(a.order));
    else
      number_lanes(begin, end, static_cast<const int32_t*>(a.order));
    load_neighbours();
  }
  // The same of the list, from its edge `begin` on.
  void load(const NearList& near, int64_t begin) {
    e.near_origin = true;
    number_lanes(begin, near.size, near.edge);
    load_neighbours();
  }
  // Points, which have no neighbours, in their given order.
  void load_points(int64_t begin, int64_t end) {
    e.near_origin = false;
    count_lanes(begin, end);
    for (int l = 0; l < L; ++l) edge[l] = begin + (l < n_edges ? l : n_edges - 1);
    load_geometry();
  }
  void load_points(const NearList& near, int64_t begin) {
    e.near_origin = true;
    number_lanes(begin, near.size, near.edge);
    load_geometry();
  }

  void count_lanes(int64_t begin, int64_t end) { n_edges = end - begin < L ? static_cast<int>(end - begin) : L; }

  template <typename I>
  void number_lanes(int64_t begin, int64_t end, const I* numbers) {
    count_lanes(begin, end);
    const int last = n_edges - 1;
    for (int l = 0; l < L; ++l) edge[l] = numbers[begin + (l < last ? l : last)];
  }

  void load_neighbours() {
    a.index64 ? find_neighbours<int64_t>() : find_neighbours<int32_t>();
    for (int l = 0; l < n_edges; ++l)
      for (int k = 0; k < p.n_gathered; k += 64 / sizeof(R)) __builtin_prefetch(inputs[l] + k);
    load_geometry();
  }
  template <typename I>
  void find_neighbours() {
    const I* src = static_cast<const I*>(a.src);
    const R* rows = static_cast<const R*>(a.features ? a.features : static_cast<const void*>(a.x));
    const int64_t stride = p.n_gathered;
    for (int l = 0; l < L; ++l) source[l] = src[edge[l]], inputs[l] = rows + source[l] * stride;
  }

  // ---- between lanes and the call's arrays, which have a row of n numbers for each edge

  // lanes [n] from rows of `from` or, where there are tangents, of both
  void load_rows(int n, const Real<R>* from, const Real<R>* tangent, V* lanes) {
    const Real<R>* const arrays[] = {from, tangent};
    for (int k = 0; k < kPlanes<R>; ++k) load_plane(n, arrays[k], plane<R>(lanes, k));
  }
  // One of the planes of `lanes`: the values or, of dual numbers, the tangents.
  void load_plane(int n, const Real<R>* from, typename Lane<Real<R>>::V* lanes) {
    const auto row = [this, n, from](int l) { return from + edge[l] * n; };
    const auto inside = [=](int l, int at, int count) { return edge[l] * n + at + count <= a.n_edges * n; };
    rows_to_lanes<Real<R>>(n, row, inside, lanes, kPlanes<R>);
  }

  void load_geometry() {
    load_rows(p.dim, a.delta, a.delta_tangent, opaque_pointer(e.delta));
    if (p.n_attr) load_rows(p.n_attr, a.attr, a.attr_tangent, e.attr);
  }

  // rows of `to` from lanes [n], of dual numbers their tangents
  void store_rows(int n, const V* lanes, Real<R>* to) {
    const auto row = [&](int l) { return to + edge[l] * n; };
    lanes_to_rows<Real<R>>(n, plane<R>(lanes, kPlanes<R> - 1), kPlanes<R>, row, n_edges);
  }

  // ---- hidden features

  // The frame, and which lanes count: those of edges of this tile, but for near ones that a later tile has.
  void enter_frame(bool all_harmonics) {
    frame_forward(p, shell, e, all_harmonics);
    near_lanes = 0;
    if (!p.regular || e.near_origin) return;
    near_lanes = lane_bits(e.radius < Limits<Real<R>>::near) & ((1u << n_edges) - 1);
  }
  // 1 in these lanes, 0 in others
  typename Lane<Real<R>>::V counting_lanes() const {
    typename Lane<Real<R>>::V lanes;
    for (int l = 0; l < L; ++l) lanes[l] = l < n_edges && !(near_lanes >> l & 1);
    return lanes;
  }

  void evaluate() {
    enter_frame(false);
    features = p.n_knots ? splines.hidden(e) : mlp.hidden(e);
    if (p.kind != kPlanar) return;
    expand_forward(p, e, features, hidden);
    features = hidden;
  }

  // The same of a table's zonal frame, times the radial factor, but as rows of the splines.
  void evaluate_rows() {
    enter_frame(false);
    splines.interpolate(e, e.factor);
  }

  // ---- the reverse sweep

  // From d_hidden: gradients of the weights and, with `need_inputs`, of the frame.
  void sweep_hidden(bool need_weights, bool need_inputs) {
    clear_frame_gradients();
    V* const d_y = p.n_knots ? splines.d_y : p.n_layers ? mlp.d_y : e.d_inputs;
    if (p.kind == kPlanar) {
      const V* y = p.n_knots ? splines.y : mlp.normed + mlp.size_z - p.hidden_flat;
      expand_backward(p, e, y, d_hidden, d_y);
    } else {
      for (int k = 0; k < p.hidden_flat; ++k) d_y[k] = d_hidden[k];
    }
    if (p.n_knots)
      splines.backward(e, n_edges, need_weights, need_inputs);
    else if (p.n_layers)
      mlp.backward(e, need_weights, need_inputs);
  }

  // The same from the gradients of evaluate_rows()'s rows, and that of the radial factor.
  void sweep_rows(const R* d_rows, bool need_weights) {
    clear_frame_gradients();
    splines.backward_of_rows(e, d_rows, n_edges, need_weights);
  }

  void clear_frame_gradients() {
    e.d_radius = V{};
    for (int m = 0; m < p.d; ++m) e.d_first[m] = e.d_second[m] = V{};
  }

  void sweep_frame() {
    frame_backward(p, shell, e);
    if (a.grad_delta) store_rows(p.dim, opaque_pointer(e.d_delta), a.grad_delta);
    if (a.grad_attr) store_rows(p.n_attr, e.d_attr, a.grad_attr);
  }

  // The gradients of all weights but the mixing ones, summed over all tiles since e.d_shell was set to 0.
  void write_mlp_weights(Real<R>* out) {
    out[p.shell_at] = result(lane_sum(e.d_shell) / (shell * shell * shell));
    if (p.n_knots) return splines.write_gradient(out);
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
  }
};

}  // namespace implicit_steer::IST_ISA
