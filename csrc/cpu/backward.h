// Backward: per node dT = θᵀ g, per tile the forward again and its reverse sweep.
#pragma once

#include "worker.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct Backward : Worker<R> {
  using Base = Worker<R>;
  using V = typename Lane<R>::V;
  using Base::a, Base::p, Base::weights, Base::tile, Base::products, Base::h, Base::by_rows, Base::mixed, Base::ring,
      Base::near, Base::ring_size, Base::n_ring, Base::node_slot_sums, Base::node_mixed;
  static constexpr int L = Lane<R>::L, QL = Lane<R>::QL;
  static constexpr int M = kVectors<R>;
  static constexpr int kColumns = M * L > kPanel ? M * L : kPanel;  // of θ: whole lines of the cache
  const bool need_geometry, need_weights, need_hidden;
  R* sums;                // T of one node, as [w][slot, v]
  R *slot_sums, *d_sums;  // T and ∂L/∂T of ring_size nodes, as [slot, v][w]
  R* d_sums_t;            // ∂L/∂T of one node, as [w][slot, v]
  R* d_theta;             // θ's gradient, of all couplings one after the other as in the packed weights
  R* grads;               // [ring_size, node_mixed] the output's gradients of the nodes in the ring
  R* columns;             // [U, kColumns] of θ [b]
  R* d_rows;              // per row of hidden features [L, padded W]; by_rows: [L, the splines' row]
  R* d_one;               // [L, QL] sums over QL are the gradients of the constant one in h
  int64_t* row_at;        // [n_rows] positions in d_rows
  int64_t row_size = 0;   // of all rows together
  Unit<R>* row_units;     // all rows' channels
  int n_row_units = 0;
  int64_t last_node = 0, next_near = 0;  // one past the block's last; where the near list is being read
  int64_t prepared[kMostNodes];          // nodes whose ∂L/∂T stand in d_sums
  int n_prepared = 0, current = 0;

  Backward(const ConvArgs<Real<R>>& args, int64_t own_edges)
      : Base(args, own_edges),
        need_geometry(a.grad_delta || a.grad_attr),
        need_weights(a.grad_weights),
        need_hidden(need_geometry || need_weights) {
    for (int r = 0; r < p.n_rows; ++r) row_size += L * padded(p.row_start[r + 1] - p.row_start[r]);
    if (by_rows) row_size = L * table_row(p);
    allocate(a, this->near, [&](Arena& arena) { place(arena); });
    products.set_constant_factors();
    list_units();
    tile.e.d_shell = V{};
  }

  void place(Arena& arena) {
    Base::place(arena, true);
    arena.take(sums, p.n_sums), arena.take(slot_sums, ring_size * node_slot_sums),
        arena.take(d_sums, ring_size * node_slot_sums);
    arena.take(d_sums_t, p.n_sums), arena.take(d_theta, theta_size()), arena.take(grads, ring_size * node_mixed);
    arena.take(columns, most_outputs() * kColumns);
    arena.take(d_rows, row_size), arena.take(d_one, L * QL), arena.take(row_at, p.n_rows);
    arena.take(row_units, row_size / (L * QL));
  }

  void list_units() {
    int64_t at = 0;
    for (int r = 0; r < p.n_rows; ++r) {
      if (by_rows) {
        row_at[r] = this->column_of(r);
        continue;
      }
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

  int64_t most_outputs() const {
    int64_t most = 0;
    for (int k = 0; k < p.n_couplings; ++k)
      if (p.couplings[k].n_out > most) most = p.couplings[k].n_out;
    return most;
  }
  int64_t theta_size() const { return p.n_couplings ? p.n_grad - p.couplings[0].theta : 0; }

  // Position of θ [b][u] of a coupling in d_theta.
  R* theta_gradient(const CouplingView& q, int b) const {
    return d_theta + (q.theta - p.couplings[0].theta) + int64_t{b} * q.theta_rows * q.theta_size;
  }
  // Position of T[slot] in slot_sums and d_sums.
  static int64_t at_slot(const Group& group, int slot) {
    return group.slot_sums + int64_t{slot - group.first} * group.q.in_stride * group.q.hidden_stride;
  }

  // ∂L/∂T of the node, in both layouts
  void start(int64_t node) {
    if (!is_prepared(node)) ++current;  // it is the next one, or none
    if (!is_prepared(node)) prepare(node);
    for_bundles(p.couplings, p.n_couplings, [&](const Group& bundle) {
      const R* d = d_sums + current * node_slot_sums + bundle.slot_sums;
      if (bundle.q.constant)
        memcpy(static_cast<void*>(d_sums_t + bundle.sums), d, sizeof(R) * bundle.width);
      else
        transpose_rows(static_cast<int>(bundle.width), bundle.q.n_hidden, d, bundle.q.hidden_stride,
                       d_sums_t + bundle.sums, bundle.width);
    });
    this->untouched = true;
    if (!need_weights) return;
    memcpy(static_cast<void*>(grads + n_ring * node_mixed), mixed + current * node_mixed, sizeof(R) * node_mixed);
  }

  bool is_prepared(int64_t node) const { return current < n_prepared && prepared[current] == node; }
  // To be prepared: the node, and those that come after it in its walk.
  void list_nodes(int64_t node) {
    n_prepared = current = 0;
    prepared[n_prepared++] = node;
    if (tile.e.near_origin) {
      while (near.node[next_near] < node) ++next_near;
      for (int64_t k = next_near; k < near.size && n_prepared < ring_size; ++k)
        if (near.node[k] != prepared[n_prepared - 1]) prepared[n_prepared++] = near.node[k];
    } else {
      for (int64_t i = node + 1; i < last_node && n_prepared < ring_size; ++i)
        if (a.index(a.rowptr, i) < a.index(a.rowptr, i + 1)) prepared[n_prepared++] = i;
    }
  }
  // d_sums of the node and the next ones
  void prepare(int64_t node) {
    list_nodes(node);
    for (int n = 0; n < n_prepared; ++n)
      for (int k = 0; k < p.out_size; ++k)
        if (p.mixed_place[k] >= 0)
          mixed[n * node_mixed + p.mixed_place[k]] = constant_number<R>(a.grad_out[prepared[n] * p.out_size + k]);
    for_slots(p.couplings, p.n_couplings, [&](const Group& group, Slots slots) {
      group.q.depthwise ? scale_channels(group, slots) : sum_outputs(group, slots);
    });
  }

  // d_sums [slot][v, w] = θ[b, v, w] g[o, v]
  void scale_channels(const Group& group, Slots slots) {
    const CouplingView& q = group.q;
    const R* weight = weights + q.theta + slots.b * q.theta_size;
    for (int slot = slots.first; slot < slots.end; ++slot)
      for (int n = 0; n < n_prepared; ++n) {
        const R* g = mixed + n * node_mixed + q.place_of_output(slot);
        R* d = d_sums + n * node_slot_sums + at_slot(group, slot);
        for (int64_t x = 0; x < q.theta_size && q.constant; x += QL)
          store_row(d + x, load_row(weight + x) * load_row(g + x));
        for (int64_t x = 0; x < q.theta_size && !q.constant; x += QL)
          store_row(d + x, load_row(weight + x) * g[x / q.hidden_stride]);
      }
  }

  // d_sums [slot][v, w] = Σ_u θ[b, u, v, w] g[o, u]
  void sum_outputs(const Group& group, Slots slots) {
    using Q = typename Lane<R>::Q;
    const CouplingView& q = group.q;
    const R* weight = weights + q.theta + slots.b * q.n_out * q.theta_size;
    int64_t x = 0;
    if (n_prepared > kNodes && q.n_out * q.theta_size * static_cast<int64_t>(sizeof(R)) > kNearestCache)
      for (; x + kColumns <= q.theta_size; x += kColumns) {
        copy_columns(q, weight + x);
        for (int k = 0; k < kColumns; k += M * L) sum_slots<V, M>(group, slots, columns + k, kColumns, x + k);
      }
    for (; x + M * L <= q.theta_size; x += M * L) sum_slots<V, M>(group, slots, weight + x, q.theta_size, x);
    for (; M > 1 && x + L <= q.theta_size; x += L) sum_slots<V, 1>(group, slots, weight + x, q.theta_size, x);
    for (; x < q.theta_size; x += QL) sum_slots<Q, 1>(group, slots, weight + x, q.theta_size, x);
  }
  // kColumns of θ [b][u], of all u: all slots and nodes read them then without gaps between the rows.
  void copy_columns(const CouplingView& q, const R* weight) {
    for (int u = 0; u < q.n_out; ++u, weight += q.theta_size) {
      memcpy(static_cast<void*>(columns + u * kColumns), weight, sizeof(R) * kColumns);
      for (size_t k = 0; k < kColumns; k += 64 / sizeof(R)) __builtin_prefetch(weight + kColumns + k, 0, 2);
    }
  }
  // W T of the columns from x on, of all nodes; `stride`: from one row of θ to the next
  template <typename T, int W>
  IST_INLINE void sum_slots(const Group& group, Slots slots, const R* weight, int64_t stride, int64_t x) {
    for (int slot = slots.first; slot < slots.end; ++slot)
      for_nodes<kTogether<W>>(n_prepared, mixed + group.q.place_of_output(slot), node_mixed,
                              d_sums + at_slot(group, slot) + x, node_slot_sums,
                              [&](const R* const* node, R* d) { sum_block<T, W>(group.q, weight, stride, node, d); });
  }
  // of kTogether<W> nodes
  template <typename T, int W>
  IST_INLINE void sum_block(const CouplingView& q, const R* weight, int64_t stride, const R* const* node, R* d) {
    constexpr int N = kTogether<W>;
    T acc[N * W] = {};
    for (int u = 0; u < q.n_out; ++u, weight += stride)
      add_term<N, W>(acc, [&](int n, int) { return node[n][u]; }, weight, u);
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < W; ++m) store_numbers(d + n * node_slot_sums + m * kWidth<T>, acc[n * W + m]);
  }

  // d_t and d_rows of the lanes l0 .. l1-1, all into one node.
  void run(int l0, int l1) {
    if (need_weights) this->accumulate(sums, l0, l1);
    for_bundles(p.couplings, p.n_couplings, [&](const Group& bundle) {
      for (const int32_t* block = bundle.blocks; block < bundle.blocks + 2 * bundle.n_blocks; block += 2)
        run_block(bundle, block[0], block[1], l0, l1);
    });
  }

  // Of one row of hidden features, and the products that it meets at `place`.
  IST_INLINE void run_block(const Group& bundle, int row, int place, int l0, int l1) {
    const CouplingView& q = bundle.q;
    const int64_t at = int64_t{l0} * p.product_size + place, pad = q.hidden_stride;
    this->with_hidden(row, l0, tile.splines.row, 1, lane_by_lane(h + p.row_start[row], l0), [&](auto hidden) {
      rank_updates<false>(l1 - l0, products.d_t + at, p.product_size, hidden, d_sums_t + bundle.sums, bundle.width, 0,
                          q.n_hidden, bundle.width);
    });
    const int64_t stride = by_rows ? tile.splines.row : pad;  // of d_rows
    const R* d = d_sums + current * node_slot_sums + bundle.slot_sums;
    if (q.constant)
      dots(l0, l1, products.t + at, d, bundle.width);
    else if (need_hidden)
      rank_updates(l1 - l0, d_rows + row_at[row] + l0 * stride, stride, numbers_at(products.t + at, p.product_size, 1),
                   d, pad, 0, static_cast<int>(bundle.width), pad);
  }

  // d_one[l] += products of row l and d
  void dots(int l0, int l1, const R* row, const R* d, int64_t n) {
    for (int l = l0; l < l1; ++l, row += p.product_size) {
      typename Lane<R>::Q sum = load_row(d_one + l * QL);
      for (int64_t x = 0; x < n; x += QL) sum += load_row(row + x) * load_row(d + x);
      store_row(d_one + l * QL, sum);
    }
  }

  // T of a node, complete, slot by slot.
  void finish(int64_t node) {
    this->complete(sums);
    for_bundles(p.couplings, p.n_couplings, [&](const Group& bundle) {
      const CouplingView& q = bundle.q;
      R* out = slot_sums + n_ring * node_slot_sums + bundle.slot_sums;
      if (q.constant)
        memcpy(static_cast<void*>(out), sums + bundle.sums, sizeof(R) * bundle.width);
      else if (need_weights)
        transpose_rows(q.n_hidden, static_cast<int>(bundle.width), sums + bundle.sums, bundle.width, out,
                       q.hidden_stride);
    });
    ring[n_ring++] = node;
    if (n_ring == ring_size) flush();
  }

  // dθ of the nodes in the ring
  void flush() {
    if (need_weights)
      for_slots(p.couplings, p.n_couplings, [&](const Group& group, Slots slots) {
        group.q.depthwise ? add_channels(group, slots) : add_fields(group, slots);
      });
    n_ring = 0;
  }

  // dθ [b][u][v, w] += Σ_n g_n[u, o] T_n[slot][v, w]; as many columns at a time as the nearest cache keeps of T
  void add_fields(const Group& group, Slots slots) {
    const CouplingView& q = group.q;
    const int64_t fit = kNearestCache / static_cast<int64_t>(sizeof(R)) / kMostNodes / kPanel * kPanel;
    R* out = theta_gradient(q, static_cast<int>(slots.b));
    for (int64_t x = 0; x < q.theta_size; x += fit)
      for (int slot = slots.first; slot < slots.end; ++slot)
        rank_updates(q.n_out, out + x, q.theta_size, numbers_at(grads + q.place_of_output(slot), 1, node_mixed),
                     slot_sums + at_slot(group, slot) + x, node_slot_sums, 0, n_ring,
                     q.theta_size - x < fit ? q.theta_size - x : fit);
  }

  // dθ [b][v, w] += Σ_n g_n[v, o] T_n[slot][v, w]
  void add_channels(const Group& group, Slots slots) {
    const CouplingView& q = group.q;
    R* out = theta_gradient(q, static_cast<int>(slots.b));
    for (int slot = slots.first; slot < slots.end; ++slot) {
      const R *g = grads + q.place_of_output(slot), *sums_of = slot_sums + at_slot(group, slot);
      for (int64_t x = 0; x < q.theta_size; x += QL) {
        typename Lane<R>::Q total = load_row(out + x);
        for (int n = 0; n < n_ring; ++n) {
          const R* at = g + n * node_mixed;
          const auto sum = load_row(sums_of + n * node_slot_sums + x);
          total += q.constant ? sum * load_row(at + x) : sum * at[x / q.hidden_stride];
        }
        store_row(out + x, total);
      }
    }
  }

  // ---- the reverse sweep of one tile

  // d_f, of dual numbers the tangents, to grad_edge or into the sums over nodes
  void store_input_gradients() {
    using P = typename Lane<Real<R>>::Q;
    for (int l = 0; l < tile.n_edges; ++l) {
      if (tile.near_lanes >> l & 1) continue;  // a later tile has them
      Real<R>* out = a.grad_edge + (a.grad_by_node ? tile.source[l] : tile.edge[l]) * p.n_gathered;
      for (int k = 0; k < p.n_gathered; k += QL) {
        const auto row = tangents_of(load_row(products.d_f + l * p.n_gathered + k));
        store_numbers(out + k, a.grad_by_node ? load_numbers<P>(out + k) + row : row);
      }
    }
  }
  template <typename Q>
  static IST_INLINE auto tangents_of(Q row) {
    if constexpr (is_dual<R>)
      return row.tangent;
    else
      return row;
  }

  // From d_rows and d_one, which are 0 in lanes that do not count, and are so again afterwards.
  void sweep_hidden_features() {
    Edges<R>& e = tile.e;
    e.d_factor = row_sums(d_one);
    by_rows ? tile.sweep_rows(d_rows, need_weights) : sweep_lanes();
    memset(static_cast<void*>(d_rows), 0, sizeof(R) * row_size);
    memset(static_cast<void*>(d_one), 0, sizeof(R) * L * QL);
  }
  void sweep_lanes() {
    Edges<R>& e = tile.e;
    V* const d_hidden = tile.d_hidden;
    for (int k = 0; k < p.hidden_flat; ++k) d_hidden[k] = V{};
    units_to_lanes<R>(n_row_units, row_units, d_rows, d_hidden);
    for (int k = 0; k < p.hidden_flat; ++k) {
      e.d_factor += d_hidden[k] * tile.features[k];
      d_hidden[k] *= e.factor;
    }
    tile.sweep_hidden(need_weights, need_geometry);
  }

  void end_tile() {
    Edges<R>& e = tile.e;
    products.reverse(tile, need_geometry);
    if (a.grad_edge) store_input_gradients();
    if (!need_hidden) return;
    sweep_hidden_features();
    if (!need_geometry) {
      e.d_shell += e.d_factor * e.factor * e.squared;
      return;
    }
    for (int m = 0; m < p.d && p.kind == kZonal; ++m)
      if (p.degree[m] > 0) e.d_first[m] += row_sums(products.d_harmonics + m * L * QL);
    tile.sweep_frame();
  }

  void nodes(int64_t first, int64_t last, Real<R>* grad_weights) {
    last_node = last;
    const auto begin = [&](int64_t i) { start(i); };
    const auto lanes = [&](int l0, int l1) { run(l0, l1); };
    const auto finish = [&](int64_t i) { this->finish(i); };
    const auto sweep = [&] { end_tile(); };
    this->walk(first, last, begin, lanes, finish, [](int64_t) {}, sweep);
    this->walk_near(begin, lanes, finish, sweep);
    flush();
    if (need_weights) write_weights(grad_weights);
  }

  void write_weights(Real<R>* out) {
    memset(out, 0, sizeof(Real<R>) * p.n_grad);
    tile.write_mlp_weights(out);
    for (int64_t k = 0; k < theta_size(); ++k) out[p.couplings[0].theta + k] = result(d_theta[k]);
  }
};

}  // namespace implicit_steer::IST_ISA
