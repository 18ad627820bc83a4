// The memory of one edge in its warp's: which arrays it has, for every kernel what it needs.
#pragma once

#include "../edge_frame.h"
#include "call.h"

namespace implicit_steer::IST_ISA {

// Hands out pieces of a warp's memory; with a null base it only counts.
template <typename N>
struct Slice {
  N* base;
  int64_t used = 0;
  IST_INLINE void take(N*& pointer, int64_t n) {
    pointer = base + used;
    used += n;
  }
  IST_INLINE void begin_quads() { used = whole_quads(static_cast<int>(used)); }
};

// The arrays of one edge.
template <typename N>
struct EdgeArrays {
  Edges<N> e;
  N *z, *y, *normed;  // pre-activations, activations, after the batch norm (or y); backward: of all layers, else of one
  N *d_z, *d_y;       // of one layer, the widest
  N *hidden, *d_hidden;  // [flat hidden size] in the couplings' coordinates; `hidden` for planar frames alone
  N *f, *d_f;            // [n_gathered] neighbour features gathered by field type; whole quads, as t
  N *t, *d_t;            // [product_size]
  N *g, *d_g;            // [n_g] G times the radial factor

  IST_INLINE void place(Slice<N>& slice, const PlanView<Real<N>>& p, const Extent& extent, Needs needs) {
    e.place(slice, p, needs.backward);
    const int64_t n = needs.backward ? extent.all_layers : extent.widest;
    slice.take(z, n), slice.take(y, n);
    normed = y;
    if (needs.backward && p.has_norms) slice.take(normed, n);
    slice.take(hidden, p.kind == kPlanar ? p.hidden_flat : 0);
    if (needs.backward) {
      slice.take(d_z, extent.widest), slice.take(d_y, extent.widest);
      d_hidden = p.n_layers || p.n_knots ? d_y : e.d_inputs;
      if (p.kind == kPlanar) slice.take(d_hidden, p.hidden_flat);
    }
    if (!needs.features) return;
    slice.begin_quads();
    slice.take(f, p.n_gathered), slice.take(t, p.product_size);
    if (needs.backward) slice.take(d_f, p.n_gathered), slice.take(d_t, p.product_size), slice.take(d_g, p.n_g);
    slice.take(g, p.n_g);
  }
};

}  // namespace implicit_steer::IST_ISA
